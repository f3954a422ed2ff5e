"""The engine with a memory of its frozen blocks: the gradients of the full computation, and fewer blocks run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.data import Batch, Dataset, evaluation_batches, training_batches
from edge_runtime.engine.block import OrtValues, Session
from edge_runtime.engine.model import BlockEngine
from edge_runtime.engine.remembered import RememberedHidden
from tests.edge.training.random_learning import alive_from, random_dataset, random_parameters, relative_error

HALF = 2e-3  # of a gradient's norm: the state that enters the lowest alive block has 11 bits
EXACT = 1e-5
LENGTHS = (3, 14, 12, 25, 11, 7, 30, 33, 5, 16, 9, 28)


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
    assert memory.used_bytes == 92 + len(LENGTHS) * (52 + 2 * 32 + 4)


def test_a_batch_remembered_in_part(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset, tmp_path: Path, runs: list[tuple[int, ...]]
) -> None:
    """Past the limit only the examples that are not remembered go through the frozen blocks."""
    parameters = random_parameters(bundle, alive_from(bundle, 2))
    (batch,) = evaluation_batches(dataset, len(LENGTHS))
    plain = BlockEngine(bundle)
    plain.use(parameters)
    with RememberedHidden(
        tmp_path, max_bytes=92 + sum(52 + tokens * (2 * 32 + 4) for tokens in sorted(LENGTHS)[:7])
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
        with RememberedHidden(tmp_path, max_bytes=1 << 24, path=tmp_path / "remembered", secret=bytes(32)) as memory:
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
