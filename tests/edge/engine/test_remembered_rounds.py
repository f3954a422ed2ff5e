"""What frozen blocks made of an example, remembered from one training to the next, and by what it is known."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.engine.remembered import RememberedHidden
from tests.edge.engine.remembering import Computer, bytes_of, eight_examples

SECRET = bytes(range(32))


@pytest.fixture
def computer() -> Computer:
    return eight_examples()


def digest(level: int) -> bytes:
    return bytes([level]) * 32


def lasting(folder: Path, *, level: int = 2, change: bytes = b"", max_bytes: int = 1 << 20) -> RememberedHidden:
    """A memory in a file with a name; ``change`` is of what all levels follow from."""
    memory = RememberedHidden(folder, max_bytes=max_bytes, path=folder / "remembered", secret=SECRET)
    memory.stand_on(level, lambda at: (change + digest(at))[:32])
    return memory


def test_the_next_training_reads_it(computer: Computer, tmp_path: Path) -> None:
    with lasting(tmp_path) as memory:
        computer.recall(memory, [1, 2])
        assert memory.spared == {}
    with lasting(tmp_path) as memory:
        found = computer.recall(memory, [2, 3, 1])
        assert memory.spared == {2: 3 + 2}
        assert memory.used_bytes == bytes_of(2, 3, 4) == (tmp_path / "remembered").stat().st_size
    assert computer.asked == [[1, 2], [3]]
    np.testing.assert_allclose(found[0][:3], computer.states[2][:3], rtol=2**-11)
    assert (tmp_path / "remembered").stat().st_mode & 0o777 == 0o600


def test_another_ground_finds_nothing(computer: Computer, tmp_path: Path) -> None:
    """A block below was trained in between, or another model came."""
    with lasting(tmp_path) as memory:
        computer.recall(memory, [1, 2])
    with lasting(tmp_path, change=b"!") as memory:
        computer.recall(memory, [1, 2])
    with lasting(tmp_path) as memory:
        computer.recall(memory, [1, 2])
    assert computer.asked == [[1, 2]] * 3
    assert computer.starts == [None] * 3


def test_a_higher_level_starts_from_the_lower_one(computer: Computer, tmp_path: Path) -> None:
    """Examples that are not all remembered start from the beginning."""
    with lasting(tmp_path) as memory:
        computer.recall(memory, [1, 2])
    with lasting(tmp_path, level=4) as memory:
        computer.recall(memory, [2, 1])
        computer.recall(memory, [3, 1])
        assert memory.spared == {2: 3 + 2, 4: 2}
    assert computer.asked == [[1, 2], [2, 1], [3]]
    first, start, none = computer.starts
    assert first is None
    assert none is None
    assert start is not None
    assert start.level == 2
    np.testing.assert_allclose(start.hidden[0][:3], computer.states[2][:3], rtol=2**-11)
    with lasting(tmp_path, level=4) as memory:
        computer.recall(memory, [1, 2, 3])
    with lasting(tmp_path, level=2) as memory:  # a lower level has no use for what a higher one made
        computer.recall(memory, [1])
    assert computer.asked[3:] == [[1]]


def test_what_rises_within_a_training_does_not_last(computer: Computer, tmp_path: Path) -> None:
    """The blocks between were trained by this device alone: the next round begins where this one did."""
    with lasting(tmp_path) as memory:
        computer.recall(memory, [1, 2])
        memory.rise(4, digest)
        computer.recall(memory, [1, 2])
        computer.recall(memory, [1, 2])
        assert memory.spared == {2: 5, 4: 5}
    with lasting(tmp_path) as memory:
        computer.recall(memory, [1, 2])
        assert memory.spared == {2: 5}
    assert computer.asked == [[1, 2], [1, 2]]
    assert [start and start.level for start in computer.starts] == [None, 2]


def test_a_crash_leaves_whole_records(computer: Computer, tmp_path: Path) -> None:
    """The memory that wrote the file is never closed, and the disk lost the end of it."""
    memory = lasting(tmp_path)
    computer.recall(memory, [1, 2, 3])
    os.truncate(tmp_path / "remembered", bytes_of(2, 3, 4) - 1)
    with lasting(tmp_path) as again:
        assert again.examples == 2
        computer.recall(again, [1, 2, 3])
        assert again.used_bytes == bytes_of(2, 3, 4)
    assert computer.asked == [[1, 2, 3], [3]]
    memory.close()


@pytest.mark.parametrize("content", [b"", b"embhid1", b"something else that is long enough to have a header....."])
def test_a_file_that_is_no_memory_is_replaced(computer: Computer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "remembered").write_bytes(content)
    for _ in range(2):
        with lasting(tmp_path) as memory:
            computer.recall(memory, [1])
            assert memory.trouble is None
    assert computer.asked == [[1]]


def test_data_that_have_changed_make_room(computer: Computer, tmp_path: Path) -> None:
    """A file that is full of what nobody asks for any more is removed, one that is asked for is not."""
    room = bytes_of(1, 2, 3)
    with lasting(tmp_path, max_bytes=room) as memory:
        computer.recall(memory, [0, 1, 2])
    with lasting(tmp_path, max_bytes=room) as memory:
        computer.recall(memory, [0, 1, 7])
    assert (tmp_path / "remembered").exists()
    with lasting(tmp_path, max_bytes=room) as memory:
        computer.recall(memory, [7])
    assert not (tmp_path / "remembered").exists()


def test_a_limit_of_zero_removes_it(computer: Computer, tmp_path: Path) -> None:
    with lasting(tmp_path) as memory:
        computer.recall(memory, [1])
    with lasting(tmp_path, max_bytes=0) as memory:
        computer.recall(memory, [1])
    assert list(tmp_path.iterdir()) == []
    assert computer.asked == [[1], [1]]


def test_a_full_disk_gives_the_file_back(computer: Computer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with lasting(tmp_path) as memory:
        computer.recall(memory, [1])
        monkeypatch.setattr(os, "pwrite", full)
        computer.recall(memory, [2])
        assert memory.trouble is not None
    assert list(tmp_path.iterdir()) == []
