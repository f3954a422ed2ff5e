"""Pieces of a batch. The laws, for any lengths and any limit:

- every example is in exactly one piece, with its own tokens, rows and labels
- a piece is no larger than the limit, unless it is one example
- the gradient of the batch is that of the pieces, whatever the division
"""

from __future__ import annotations

import weakref

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundle import WEIGHTS_FILE, Bundle, open_bundle
from edge_runtime.data import Batch, bucket_length, evaluation_batches
from edge_runtime.engine.interface import Gradients, Score
from edge_runtime.engine.model import BlockEngine
from edge_runtime.training.accumulate import accumulate, default_micro_tokens, micro_batches
from edge_runtime.training.local import evaluate
from tests.edge.training.random_learning import alive_from, random_dataset, random_parameters, relative_error

EXACT = 1e-5  # of a gradient's norm: only the order of float32 sums differs
LENGTHS = (3, 40, 12, 25, 11, 7, 40, 33)


def batch_of(lengths: list[int], *, extra: int = 0) -> Batch:
    """Token t of example i is 1000 i + t; the rows are the last two tokens of each (one of a single token)."""
    width = bucket_length(max(lengths), 10_000) + extra
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    ids = mask * (1000 * np.arange(len(lengths))[:, None] + np.arange(width))
    rows = np.array([i * width + t for i, length in enumerate(lengths) for t in range(max(length - 2, 0), length)])
    return Batch(ids, mask, rows=rows, labels=ids.reshape(-1)[rows] + 7, examples=np.arange(len(lengths)) + 50)


def shapes(lengths: list[int], limit: int) -> list[tuple[int, ...]]:
    return [part.input_ids.shape for part in micro_batches(batch_of(lengths), limit)]


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), limit=st.integers(1, 5000))
def test_the_pieces_are_the_batch(lengths: list[int], limit: int) -> None:
    batch = batch_of(lengths)
    seen = []
    for part in micro_batches(batch, limit):
        count, width = part.input_ids.shape
        assert count * width <= limit or count == 1
        assert width == bucket_length(int(part.attention_mask.sum(axis=1).max()), batch.input_ids.shape[1])
        assert (np.diff(part.rows) > 0).all()
        assert (part.labels == part.input_ids.reshape(-1)[part.rows] + 7).all()
        for number, example in enumerate(part.examples):
            length = lengths[example - 50]
            seen.append(int(example))
            assert part.attention_mask[number].tolist() == [1] * length + [0] * (width - length)
            assert part.input_ids[number, :length].tolist() == list(
                range(1000 * (example - 50), 1000 * (example - 50) + length)
            )
            mine = part.rows[part.rows // width == number] % width
            assert mine.tolist() == list(range(max(length - 2, 0), length))
    assert sorted(seen) == batch.examples.tolist()


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_dividing_what_fits_pays_for_every_further_pass(lengths: list[int]) -> None:
    """Each piece beyond the first has saved at least 128 tokens of padding."""
    parts = micro_batches(batch_of(lengths), 1 << 30)
    assert batch_of(lengths).input_ids.size - sum(part.input_ids.size for part in parts) >= 128 * (len(parts) - 1)


def test_what_is_divided_and_what_is_not() -> None:
    assert shapes([64] * 8, 4096) == [(8, 64)]  # nothing to save
    assert shapes([8] * 8 + [128] * 8, 4096) == [(8, 128), (8, 8)]  # saves 960 of 2,048 tokens
    assert shapes([112] * 8 + [128] * 8, 4096) == [(16, 128)]  # would save 128 tokens, but only a sixteenth
    assert shapes([8] * 4 + [32] * 4, 4096) == [(8, 32)]  # would save three eighths, but only 96 tokens
    assert shapes([8] * 8 + [64] * 8 + [256] * 8, 1 << 20) == [(8, 256), (8, 64), (8, 8)]
    assert shapes([64] * 9, 256) == [(3, 64), (3, 64), (3, 64)]  # evenly, as few pieces as fit
    assert shapes([64] * 3, 10) == [(1, 64)] * 3  # an example is never divided
    batch = batch_of([64] * 3)
    assert micro_batches(batch, 4096)[0] is batch


@pytest.fixture(scope="module", params=["bert", "llama"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return open_bundle(request.getfixturevalue(f"{request.param}_bundle"))


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> BlockEngine:
    engine = BlockEngine(bundle)
    engine.use(random_parameters(bundle, alive_from(bundle, 0)))
    return engine


@pytest.mark.parametrize("limit", [1, 64, 100])
def test_the_gradient_does_not_depend_on_the_division(bundle: Bundle, engine: BlockEngine, limit: int) -> None:
    """Loss, count and every gradient: the pieces have different numbers of trained tokens."""
    (batch,) = evaluation_batches(random_dataset(bundle, LENGTHS), len(LENGTHS))
    assert len(micro_batches(batch, limit)) > 2
    whole, pieces = engine.gradients(batch), accumulate(engine, batch, limit)
    assert pieces.score.loss == pytest.approx(whole.score.loss, rel=EXACT)
    assert (pieces.score.rows, pieces.score.correct) == (whole.score.rows, whole.score.correct)
    assert relative_error(pieces.tensors, whole.tensors) < EXACT


def test_padding_changes_nothing(bundle: Bundle, engine: BlockEngine) -> None:
    """The same examples padded to any length have the same gradients."""
    (batch,) = evaluation_batches(random_dataset(bundle, LENGTHS), len(LENGTHS))
    whole = engine.gradients(batch)
    width = batch.input_ids.shape[1]
    for extra in (1, 8, 24):
        rows = batch.rows // width * (width + extra) + batch.rows % width
        ids, mask = (np.pad(a, ((0, 0), (0, extra))) for a in (batch.input_ids, batch.attention_mask))
        padded = engine.gradients(Batch(ids, mask, rows=rows, labels=batch.labels, examples=batch.examples))
        assert padded.score.loss == pytest.approx(whole.score.loss, rel=EXACT)
        assert relative_error(padded.tensors, whole.tensors) < EXACT


def test_evaluation_is_divided_too(bundle: Bundle, engine: BlockEngine) -> None:
    dataset = random_dataset(bundle, LENGTHS)
    whole, pieces = evaluate(engine, dataset), evaluate(engine, dataset, micro_tokens=1)
    assert (pieces.rows, pieces.correct) == (whole.rows, whole.correct)
    assert pieces.loss == pytest.approx(whole.loss, rel=EXACT)


class Watcher:
    """An engine whose gradients can be counted while they live."""

    def __init__(self) -> None:
        self.alive: list[int] = []
        self._made: list[weakref.ref[np.ndarray]] = []

    def gradients(self, batch: Batch) -> Gradients:
        self.alive.append(sum(each() is not None for each in self._made))
        gradient = np.ones(3, dtype=np.float32)
        self._made.append(weakref.ref(gradient))
        return Gradients(Score(1.0, 1, batch.weight), {"a": gradient})


def test_the_pieces_gradients_are_not_kept() -> None:
    """When a piece begins, the gradients of those before it are gone."""
    engine = Watcher()
    made = accumulate(engine, batch_of([16] * 5), 16)  # type: ignore[arg-type]  # no other method is called
    assert engine.alive == [0] * 5
    assert made.tensors["a"] == pytest.approx(np.ones(3))
    assert made.score == Score(5.0, 5, 10)


def test_the_default_follows_model_and_budget(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what the weights leave for the inputs of all blocks, from 256 to 4,096 tokens."""

    def default(budget_mb: int | None, weight_bytes: int) -> int:
        files = bundle.manifest.files
        changed = {**files, WEIGHTS_FILE: msgspec.structs.replace(files[WEIGHTS_FILE], bytes=weight_bytes)}
        # three blocks of width 32: 384 bytes a token
        return default_micro_tokens(msgspec.structs.replace(bundle.manifest, files=changed), budget_mb)

    assert default(None, 0) == 4096
    assert default(0, 100) == 256
    assert default(1, 0) == (1 << 19) // 384 == 1365
    assert default(1, 1 << 19) == (1 << 18) // 384 == 682
    assert default(1, 1 << 30) == 1365  # the weights do not stay, so all of it is for activations
    assert default(100, 0) == 4096
    monkeypatch.setattr("edge_runtime.engine.budget.default_budget_mb", lambda: 1)
    assert default(None, 1 << 19) == 682
