"""What frozen blocks made of an example, remembered: right numbers, less work, and never the wrong example's."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.data import Batch, Dataset, evaluation_batches, training_batches
from edge_runtime.engine.block import OrtValues, Session
from edge_runtime.engine.hidden_file import KEY_BYTES
from edge_runtime.engine.model import BlockEngine
from edge_runtime.engine.remembered import RememberedHidden, Start, memory_limit
from tests.edge.training.random_learning import alive_from, random_dataset, random_parameters, relative_error

HALF = 2e-3  # of a gradient's norm: the state that enters the lowest alive block has 11 bits
EXACT = 1e-5
LENGTHS = (3, 14, 12, 25, 11, 7, 30, 33, 5, 16, 9, 28)
WIDTH = 6


class Computer:
    """Stands for the frozen blocks: row i of ``states`` is what they make of example i, shape (n, s, WIDTH)."""

    def __init__(self, states: np.ndarray, wanted: np.ndarray) -> None:
        self.states, self.wanted = states, wanted
        self.asked: list[list[int]] = []
        self.starts: list[Start | None] = []

    def recall(self, memory: RememberedHidden, examples: list[int]) -> np.ndarray:
        index = np.array(examples)

        def compute(missing: np.ndarray, start: Start | None) -> np.ndarray:
            self.asked.append(index[missing].tolist())
            self.starts.append(start)
            return self.states[index[missing]]

        return memory.recall([key_of(example) for example in examples], self.wanted[index], compute)


@pytest.fixture
def computer() -> Computer:
    """Eight examples of 1 to 8 tokens in 8."""
    rng = np.random.default_rng(0)
    wanted = np.arange(8) < np.arange(1, 9)[:, None]
    return Computer(rng.normal(size=(8, 8, WIDTH)).astype(np.float32), wanted)


def key_of(example: int) -> bytes:
    return bytes([example]) * KEY_BYTES


def bytes_of(*tokens: int) -> int:
    """A file with examples of so many tokens."""
    return 44 + sum(28 + count * (2 * WIDTH + 4) for count in tokens)


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
    with RememberedHidden(tmp_path, max_bytes=bytes_of(4, 3, 2) + 6) as memory:
        for _ in range(2):
            computer.recall(memory, [3, 7, 2, 1])  # 4, 8, 3 and 2 tokens
        assert computer.asked == [[3, 7, 2, 1], [7]]
        assert memory.used_bytes == bytes_of(4, 3, 2)
        assert os.fstat(memory._file._file.fileno()).st_size == bytes_of(4, 3, 2)  # type: ignore[union-attr]  # it is open
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


# From one training to the next.


def digest(level: int) -> bytes:
    return bytes([level]) * 32


def lasting(folder: Path, *, level: int = 2, change: bytes = b"", max_bytes: int = 1 << 20) -> RememberedHidden:
    """A memory in a file with a name; ``change`` is of what all levels follow from."""
    memory = RememberedHidden(folder, max_bytes=max_bytes, path=folder / "remembered")
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


# With the engine.


@pytest.fixture(scope="module", params=["bert", "llama"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """Three blocks; the BERT has a head that is trained, the Llama has none."""
    return open_bundle(request.getfixturevalue(f"{request.param}_bundle"))


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> BlockEngine:
    return BlockEngine(bundle)


@pytest.fixture
def dataset(bundle: Bundle) -> Dataset:
    return random_dataset(bundle, LENGTHS)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[RememberedHidden]:
    """Room for everything."""
    with RememberedHidden(tmp_path, max_bytes=1 << 24) as memory:
        yield memory


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shape of the hidden state of every forward pass of a block."""
    shapes: list[tuple[int, ...]] = []
    run = Session.run

    def counted(session: Session, *sources: OrtValues) -> OrtValues:
        if "out" in session.outputs:
            shapes.append(tuple(sources[0]["hidden"].shape()))
        return run(session, *sources)

    monkeypatch.setattr(Session, "run", counted)
    return shapes


def batches(dataset: Dataset, seed: int) -> list[Batch]:
    """One epoch of four batches."""
    return list(training_batches(dataset, 3, steps=4, rng=np.random.default_rng(seed)))


def each_alive(test: Callable[..., None]) -> Callable[..., None]:
    """The lowest alive block is 1, 2, or 3: only the head, which needs a head that is trained."""
    return pytest.mark.parametrize("lowest", [1, 2, 3])(test)


def needs_head(bundle: Bundle, lowest: int) -> None:
    if lowest == len(bundle.manifest.blocks) and not bundle.manifest.head.params:
        pytest.skip("this model's head is not trained")


@each_alive
def test_gradients_are_those_of_the_full_computation(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset, memory: RememberedHidden, lowest: int
) -> None:
    """In the first epoch exactly, later to half precision, in other batches with other padding."""
    needs_head(bundle, lowest)
    parameters = random_parameters(bundle, alive_from(bundle, lowest))
    plain = BlockEngine(bundle)
    plain.use(parameters)
    engine.use(parameters, memory)
    assert engine.lowest_alive == lowest
    for epoch in range(3):
        for batch in batches(dataset, epoch):
            wanted, found = plain.gradients(batch), engine.gradients(batch)
            assert found.score.loss == pytest.approx(wanted.score.loss, rel=EXACT if epoch == 0 else HALF)
            error = relative_error(found.tensors, wanted.tensors)
            assert error < EXACT if epoch == 0 else EXACT < error < HALF  # not the very same: it was remembered


@each_alive
def test_the_second_epoch_skips_the_frozen_blocks(
    bundle: Bundle,
    engine: BlockEngine,
    dataset: Dataset,
    memory: RememberedHidden,
    runs: list[tuple[int, ...]],
    lowest: int,
) -> None:
    needs_head(bundle, lowest)
    engine.use(random_parameters(bundle, alive_from(bundle, lowest)), memory)
    for epoch, blocks in enumerate([3, 3 - lowest, 3 - lowest]):
        runs.clear()
        for batch in batches(dataset, epoch):
            engine.gradients(batch)
        assert len(runs) == 4 * blocks


def test_only_the_rows_of_the_head_are_remembered_when_nothing_else_is_alive(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset, memory: RememberedHidden
) -> None:
    """For a classifier one token an example, not all of them."""
    needs_head(bundle, 3)
    engine.use(random_parameters(bundle, alive_from(bundle, 3)), memory)
    for batch in batches(dataset, 0):
        engine.gradients(batch)
    assert memory.examples == len(LENGTHS)
    assert memory.used_bytes == 44 + len(LENGTHS) * (28 + 2 * 32 + 4)


def test_a_batch_remembered_in_part(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset, tmp_path: Path, runs: list[tuple[int, ...]]
) -> None:
    """Past the limit only the examples that are not remembered go through the frozen blocks."""
    parameters = random_parameters(bundle, alive_from(bundle, 2))
    (batch,) = evaluation_batches(dataset, len(LENGTHS))
    plain = BlockEngine(bundle)
    plain.use(parameters)
    with RememberedHidden(
        tmp_path, max_bytes=44 + sum(28 + tokens * (2 * 32 + 4) for tokens in sorted(LENGTHS)[:7])
    ) as memory:
        engine.use(parameters, memory)
        engine.gradients(batch)
        assert memory.examples == 7
        wanted = plain.gradients(batch)
        runs.clear()
        found = engine.gradients(batch)
    width = batch.input_ids.shape[1]
    assert runs == [(5, width, 32), (5, width, 32), (12, width, 32)]
    assert 0 < relative_error(found.tensors, wanted.tensors) < HALF


def test_everything_alive_remembers_nothing(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset, memory: RememberedHidden
) -> None:
    engine.use(random_parameters(bundle, alive_from(bundle, 0)), memory)
    for batch in batches(dataset, 0):
        engine.gradients(batch)
    assert memory.examples == 0


def test_the_next_use_ends_it(bundle: Bundle, engine: BlockEngine, dataset: Dataset, memory: RememberedHidden) -> None:
    """A memory given to a second adapter is closed, not believed."""
    batch = batches(dataset, 0)[0]
    engine.use(random_parameters(bundle, alive_from(bundle, 2)), memory)
    engine.gradients(batch)
    descriptor = memory._file._file.fileno()  # type: ignore[union-attr]  # it is open
    other = random_parameters(bundle, alive_from(bundle, 1), seed=1)
    engine.use(other, memory)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert memory.examples == 0
    plain = BlockEngine(bundle)
    plain.use(other)
    for _ in range(2):
        assert relative_error(engine.gradients(batch).tensors, plain.gradients(batch).tensors) < EXACT


@pytest.mark.parametrize("frozen", [1, 2], ids=["the block at the boundary", "one above it"])
def test_blocks_frozen_on_the_way(
    bundle: Bundle,
    engine: BlockEngine,
    dataset: Dataset,
    memory: RememberedHidden,
    runs: list[tuple[int, ...]],
    frozen: int,
) -> None:
    """What is remembered holds; where the lowest alive block is a higher one, as far as it goes."""
    parameters = random_parameters(bundle, alive_from(bundle, 1))
    engine.use(parameters, memory)
    for batch in batches(dataset, 0):
        engine.gradients(batch)
    for name in sorted(parameters.alive):  # as if trained: what the blocks made of an example changes above block 0
        parameters.tensors[name][...] *= np.float32(1.1)
    blocks = {module.name: module.block for module in bundle.manifest.modules}
    still = {name for name in parameters.alive if blocks.get(name.rpartition(".lora_")[0]) == frozen}
    parameters.freeze(still)
    engine.use(parameters, memory)
    assert memory.examples == (0 if frozen == 1 else len(LENGTHS))
    plain = BlockEngine(bundle)
    plain.use(parameters)
    first, later = (2, 1) if frozen == 1 else (2, 2)
    for epoch, ran in ((1, first), (2, later)):
        wanted = [plain.gradients(batch).tensors for batch in batches(dataset, epoch)]
        runs.clear()
        found = [engine.gradients(batch).tensors for batch in batches(dataset, epoch)]
        assert len(runs) == 4 * ran
        assert found[0].keys() == parameters.alive
        for mine, theirs in zip(found, wanted, strict=True):
            assert relative_error(mine, theirs) < HALF


def test_evaluation_knows_nothing_of_it(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset, memory: RememberedHidden
) -> None:
    """Other examples with the same indices and lengths, evaluated while the memory is full, are computed."""
    parameters = random_parameters(bundle, alive_from(bundle, 2))
    plain = BlockEngine(bundle)
    plain.use(parameters)
    engine.use(parameters, memory)
    for batch in batches(dataset, 0):
        engine.gradients(batch)
    used = memory.used_bytes
    (other,) = evaluation_batches(random_dataset(bundle, LENGTHS, seed=1), len(LENGTHS))
    assert engine.evaluate(other) == plain.evaluate(other)
    np.testing.assert_array_equal(engine.logits(other), plain.logits(other))
    assert memory.used_bytes == used


def test_a_later_round_reads_what_an_earlier_one_wrote(
    bundle: Bundle, dataset: Dataset, tmp_path: Path, runs: list[tuple[int, ...]]
) -> None:
    """In another process: the second starts at block 1, the third goes on from there, the fourth was trained below."""

    def pass_over(lowest: int, *, seed: int = 0) -> int:
        engine, parameters = BlockEngine(bundle), random_parameters(bundle, alive_from(bundle, lowest), seed=seed)
        with RememberedHidden(tmp_path, max_bytes=1 << 24, path=tmp_path / "remembered") as memory:
            engine.use(parameters, memory)
            runs.clear()
            found = [engine.gradients(batch) for batch in batches(dataset, 0)]
            count = len(runs)
        plain = BlockEngine(bundle)
        plain.use(parameters)
        for batch, gradients in zip(batches(dataset, 0), found, strict=True):
            assert relative_error(gradients.tensors, plain.gradients(batch).tensors) < 2 * HALF
        return count

    forward = [pass_over(1), pass_over(1), pass_over(2), pass_over(2), pass_over(2, seed=1)]
    assert forward == [4 * 3, 4 * 2, 4 * 2, 4 * 1, 4 * 3]
