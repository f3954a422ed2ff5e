"""What is remembered of private texts cannot be read from the disk, nor can it be told whether a text is among them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.engine.hidden_file import HEADER_BYTES, KEY_BYTES, _pack, record_bytes
from edge_runtime.engine.remembered import RememberedHidden
from tests.edge.engine.remembering import WIDTH, Computer, bytes_of, eight_examples, key_of

SECRET = bytes(range(32))


@pytest.fixture
def computer() -> Computer:
    return eight_examples()


def memory_of(folder: Path, secret: bytes | None = SECRET) -> RememberedHidden:
    memory = RememberedHidden(folder, max_bytes=1 << 20, path=folder / "remembered", secret=secret)
    memory.stand_on(2, lambda level: bytes([level]) * 32)
    return memory


def traces(computer: Computer, example: int) -> list[bytes]:
    """What of an example a file could show: its digest, its values in half precision and as they were computed."""
    rows = computer.states[example][computer.wanted[example]]
    return [key_of(example), _pack(rows)[-2 * WIDTH :], rows[-1].tobytes()]


@pytest.mark.parametrize("named", [True, False])
def test_the_disk_shows_nothing(computer: Computer, tmp_path: Path, named: bool) -> None:
    """A file without a name is taken back by the system, not by the disk."""
    memory = memory_of(tmp_path) if named else RememberedHidden(tmp_path, max_bytes=1 << 20)
    computer.recall(memory, [1, 5])
    assert memory._file is not None
    data = os.pread(memory._file._file.fileno(), 1 << 20, 0)
    memory.close()
    assert len(data) == bytes_of(2, 6)
    assert not [trace for example in (1, 5) for trace in traces(computer, example) if trace in data]


@pytest.mark.parametrize("secret", [bytes(32), None])
def test_another_secret_finds_nothing(computer: Computer, tmp_path: Path, secret: bytes | None) -> None:
    with memory_of(tmp_path) as memory:
        computer.recall(memory, [1])
    with memory_of(tmp_path, secret) as memory:
        computer.recall(memory, [1])
        assert memory.trouble is None
    assert computer.asked == [[1], [1]]
    with memory_of(tmp_path, secret) as memory:
        computer.recall(memory, [1])
    assert computer.asked == [[1], [1]] + ([[1]] if secret is None else [])


def test_equal_files_are_never_encrypted_equally(computer: Computer, tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        with memory_of(tmp_path) as memory:
            computer.recall(memory, [1])
        made.append((tmp_path / "remembered").read_bytes())
        (tmp_path / "remembered").unlink()
    one, two = (data[HEADER_BYTES:] for data in made)
    assert one[:KEY_BYTES] != two[:KEY_BYTES]  # nor does a name tell that two files have one example
    assert one[-2 * WIDTH - 16 :] != two[-2 * WIDTH - 16 :]


@pytest.mark.parametrize("place", range(0, record_bytes(2, WIDTH), 3))
def test_a_flipped_bit_anywhere_in_a_record_is_computed_again(computer: Computer, tmp_path: Path, place: int) -> None:
    with memory_of(tmp_path) as memory:
        computer.recall(memory, [1])
    data = bytearray((tmp_path / "remembered").read_bytes())
    data[HEADER_BYTES + place] ^= 1
    (tmp_path / "remembered").write_bytes(data)
    with memory_of(tmp_path) as memory:
        found = computer.recall(memory, [1])
    assert computer.asked == [[1], [1]]
    np.testing.assert_array_equal(found[0], computer.states[1])


def test_records_cannot_be_swapped(computer: Computer, tmp_path: Path) -> None:
    """Two examples of equal length, each under the other's name; and one from another file under its own."""
    computer.wanted = np.tile(computer.wanted[3], (8, 1))
    size = record_bytes(4, WIDTH)
    with memory_of(tmp_path) as memory:
        computer.recall(memory, [1, 2])
    path = tmp_path / "remembered"
    data = path.read_bytes()
    one, two = (data[HEADER_BYTES + size * index :][:size] for index in (0, 1))
    path.write_bytes(data[:HEADER_BYTES] + one[:16] + two[16:] + two[:16] + one[16:])
    with memory_of(tmp_path) as memory:
        computer.recall(memory, [1, 2])
    assert computer.asked == [[1, 2]] * 2
    path.unlink()
    with memory_of(tmp_path) as memory:
        computer.recall(memory, [1])
    path.write_bytes(path.read_bytes()[:HEADER_BYTES] + one)
    with memory_of(tmp_path) as memory:
        computer.recall(memory, [1])
    assert computer.asked[2:] == [[1]] * 2
