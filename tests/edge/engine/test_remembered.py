"""What frozen blocks made of an example, remembered within a training: right numbers, less work, no more disk."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.engine.remembered import RememberedHidden, memory_limit
from tests.edge.engine.remembering import WIDTH, Computer, bytes_of, eight_examples, key_of


@pytest.fixture
def computer() -> Computer:
    return eight_examples()


def test_a_batch_is_computed_once(computer: Computer, tmp_path: Path) -> None:
    """The second time the wanted tokens are read, and what is not wanted is zero."""
    with RememberedHidden(tmp_path, max_bytes=1 << 20) as memory:
        first = computer.recall(memory, [2, 5])
        second = computer.recall(memory, [5, 2])
        assert computer.asked == [[2, 5]]
        assert memory.used_bytes == bytes_of(3, 6)
    np.testing.assert_array_equal(first, computer.states[[2, 5]])
    for row, example in enumerate([5, 2]):
        wanted = computer.wanted[example]
        np.testing.assert_allclose(second[row][wanted], computer.states[example][wanted], rtol=2**-11)
        assert not second[row][~wanted].any()


def test_only_what_is_missing_is_computed(computer: Computer, tmp_path: Path) -> None:
    with RememberedHidden(tmp_path, max_bytes=1 << 20) as memory:
        computer.recall(memory, [2, 5])
        mixed = computer.recall(memory, [7, 5, 0, 2])
        assert computer.asked == [[2, 5], [7, 0]]
        np.testing.assert_array_equal(mixed[[0, 2]], computer.states[[7, 0]])
        np.testing.assert_allclose(mixed[1][:6], computer.states[5][:6], rtol=2**-11)
        computer.recall(memory, [0, 7])
        assert len(computer.asked) == 2


def test_the_limit_is_kept(computer: Computer, tmp_path: Path) -> None:
    """What does not fit any more is computed every time; what is smaller may still fit."""
    with RememberedHidden(tmp_path, max_bytes=bytes_of(4, 3) + 6) as memory:
        for _ in range(2):
            computer.recall(memory, [3, 7, 2])  # 4, 8 and 3 tokens
        assert computer.asked == [[3, 7, 2], [7]]
        assert memory.used_bytes == bytes_of(4, 3)
        assert os.fstat(memory._file._file.fileno()).st_size == bytes_of(4, 3)  # type: ignore[union-attr]  # it is open
        assert memory.trouble is None


def test_a_limit_of_zero_touches_no_disk(computer: Computer, tmp_path: Path) -> None:
    with RememberedHidden(tmp_path / "nowhere", max_bytes=0) as memory:
        for _ in range(2):
            computer.recall(memory, [3])
        assert len(computer.asked) == 2
        assert memory.trouble is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_remembered(computer: Computer, tmp_path: Path, bad: float) -> None:
    """Nor does it keep others out; where it is not wanted it does not matter."""
    computer.states[3, 2, 1] = bad  # a wanted token
    computer.states[4, 7, 1] = bad  # padding
    with RememberedHidden(tmp_path, max_bytes=1 << 20) as memory:
        computer.recall(memory, [3, 4, 5])
        assert memory.examples == 2
        computer.recall(memory, [3, 4, 5])
        assert computer.asked[1] == [3]


@settings(max_examples=200)
@given(
    rows=st.lists(
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False)
            | st.sampled_from([1e4, -3e5, 65504.0, 65520.0, 1e38, 1e-30, 0.0]),
            min_size=WIDTH,
            max_size=WIDTH,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_nothing_overflows_and_half_precision_is_kept(
    rows: list[list[float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Relative error 2**-11; of values far below the token's largest, 2**-39 of that one. Scales are a token's own."""
    state = np.array(rows, dtype=np.float32)[None]
    with RememberedHidden(tmp_path_factory.getbasetemp(), max_bytes=1 << 20) as memory:
        for _ in range(2):
            found = memory.recall([key_of(0)], np.ones(state.shape[:2], bool), lambda missing, start: state)
    top = np.abs(state).max(axis=2, keepdims=True).astype(np.float64)
    # Beyond 2**127 a token is computed each time, exactly.
    allowed = np.maximum(np.abs(state) * 2.0**-11, top * 2.0**-39) + 1e-41  # the last: float32 ends there
    assert (np.abs(found.astype(np.float64) - state) <= allowed).all()


def test_a_full_disk_ends_it_and_gives_everything_back(
    computer: Computer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch at hand is right, later ones are computed as a whole, and the reason can be told."""
    written = Counter[str]()
    write = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        written["calls"] += 1
        if written["calls"] > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    memory = RememberedHidden(tmp_path, max_bytes=1 << 20)
    for examples in ([1, 2], [3, 4, 1], [1, 2]):
        np.testing.assert_allclose(
            computer.recall(memory, examples)[0][:2], computer.states[examples[0]][:2], rtol=2**-11
        )
    assert computer.asked == [[1, 2], [3, 4], [1, 2]]
    assert memory.trouble == "remembering ended, blocks are computed again: No space left on device"
    assert (memory.examples, memory._file) == (0, None)
    assert written["calls"] == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_disk_that_is_full_from_the_start(
    computer: Computer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = os.fdopen(os.open("/dev/full", os.O_RDWR), "r+b", buffering=0)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: device)
    memory = RememberedHidden(tmp_path, max_bytes=1 << 20)
    np.testing.assert_array_equal(computer.recall(memory, [1, 2]), computer.states[[1, 2]])
    assert "No space left" in str(memory.trouble)


def test_a_folder_that_is_gone(computer: Computer, tmp_path: Path) -> None:
    memory = RememberedHidden(tmp_path / "gone", max_bytes=1 << 20)
    np.testing.assert_array_equal(computer.recall(memory, [1, 2]), computer.states[[1, 2]])
    assert "No such file" in str(memory.trouble)


@pytest.mark.parametrize("harm", ["cut", "other"])
def test_a_damaged_record_is_noticed(computer: Computer, tmp_path: Path, harm: str) -> None:
    """What the disk does not give back as it was is computed, and remembered again."""
    memory = RememberedHidden(tmp_path, max_bytes=1 << 20)
    computer.recall(memory, [1, 2])
    descriptor = memory._file._file.fileno()  # type: ignore[union-attr]  # it is open
    if harm == "cut":
        os.ftruncate(descriptor, bytes_of(2, 3) - 5)
    else:
        os.pwrite(descriptor, b"\x55", bytes_of(2, 3) - 5)
    np.testing.assert_array_equal(computer.recall(memory, [1, 2])[1], computer.states[2])
    computer.recall(memory, [1, 2])
    assert computer.asked == [[1, 2], [2]]
    assert memory.trouble is None
    memory.close()


def test_the_file_has_no_name_and_ends_with_closing(computer: Computer, tmp_path: Path) -> None:
    """So that nothing is left behind however the process ends."""
    memory = RememberedHidden(tmp_path, max_bytes=1 << 20)
    computer.recall(memory, [1, 2])
    descriptor = memory._file._file.fileno()  # type: ignore[union-attr]  # it is open
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(descriptor).st_nlink == 0
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    computer.recall(memory, [1, 2])
    computer.recall(memory, [1, 2])
    assert computer.asked == [[1, 2]] * 3
    memory.close()


def test_other_tokens_are_wanted(computer: Computer, tmp_path: Path) -> None:
    """Then what is remembered is of no use."""
    with RememberedHidden(tmp_path, max_bytes=1 << 20) as memory:
        computer.recall(memory, [1, 2])
        computer.wanted[2, 5] = True
        computer.recall(memory, [1, 2])
    assert computer.asked == [[1, 2], [2]]


def test_the_limit_follows_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 5 << 30})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert memory_limit(tmp_path, None) == (5 << 30) // 10
    usage.free = 100 << 30
    assert memory_limit(tmp_path, None) == 2 << 30
    assert memory_limit(tmp_path, 3) == 3 << 20
    assert memory_limit(tmp_path, 0) == 0
