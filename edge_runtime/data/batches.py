"""Examples to padded arrays: training batches for ever, evaluation batches once.

Every epoch has every example exactly once. Padding stands on the right and is never a row of the head. The length of
a batch is rounded up to one of a few lengths, so that the engine meets few different shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from edge_runtime.data.dataset import Dataset

WINDOW_BATCHES = 8  # batches among which examples of like length are grouped

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """b examples padded to s tokens, and the n rows of them that the head sees. All arrays are int64.

    Attributes:
        input_ids: Token ids, shape (b, s).
        attention_mask: 1 on tokens, 0 on padding, shape (b, s).
        rows: Flat positions in (b · s) that go to the head, ascending, shape (n,). classify: ``i * s`` of example i,
            so n = b. lm: every position whose next token is trained.
        labels: The class id at each row, shape (n,): the label's index (-1 when it has none), or the next token's id.
        examples: Index of each example in the dataset, shape (b,).
    """

    input_ids: Indices
    attention_mask: Indices
    rows: Indices
    labels: Indices
    examples: Indices

    @property
    def weight(self) -> int:
        """Examples for classify, trained tokens for lm; over an epoch it sums to the dataset's weight."""
        return len(self.rows)


def bucket_length(tokens: int, max_tokens: int) -> int:
    """Length that rows of up to ``tokens`` tokens are padded to.

    The lengths are all up to 16, then eight between one power of two and the next, and ``max_tokens``: no more than
    72 for 2,048 tokens. The longest row gets less than an eighth of its length in padding.

    Args:
        tokens: Length of the longest row, from 1 to ``max_tokens``.
        max_tokens: No length is above it.
    """
    step = max(1, (1 << (tokens - 1).bit_length()) // 16)
    return min(-(-tokens // step) * step, max_tokens)


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Batches in one pass over the dataset, the last short one included."""
    return -(-len(dataset) // batch_size)


def training_batches(
    dataset: Dataset, batch_size: int, *, steps: int, rng: np.random.Generator, done: int = 0
) -> Iterator[Batch]:
    """Exactly ``steps`` batches out of endless shuffled epochs; the same ``rng`` state gives the same batches.

    Each epoch is a new permutation. Inside windows of :data:`WINDOW_BATCHES` batches, examples are grouped by length
    and the batches shuffled, which saves padding; the short batch of an epoch can therefore be any of its last ones.

    Args:
        dataset: At least one example.
        batch_size: Examples a batch, ≥ 1.
        steps: Batches to yield, ≥ 0.
        rng: Advanced as epochs begin.
        done: How many of these steps an interrupted training has taken: their batches are left out.

    Raises:
        ValueError: a number is out of its range, or the dataset is empty.
    """
    _check(dataset, batch_size)
    if steps < 0:
        raise ValueError(f"steps: out of range: expected at least 0, got {steps}")
    return (_batch(dataset, chosen) for chosen in islice(_shuffled(dataset, batch_size, rng), done, steps))


def evaluation_batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Every example once, the shortest first; equal lengths keep their order.

    Raises:
        ValueError: as :func:`training_batches`.
    """
    _check(dataset, batch_size)
    order = np.argsort(_lengths(dataset), kind="stable").astype(np.int64)
    return (_batch(dataset, order[at : at + batch_size]) for at in range(0, len(order), batch_size))


def _check(dataset: Dataset, batch_size: int) -> None:
    for name, value in (("examples", len(dataset)), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: out of range: expected at least 1, got {value}")


def _lengths(dataset: Dataset) -> Indices:
    return np.array([len(example.ids) for example in dataset.examples], np.int64)


def _shuffled(dataset: Dataset, batch_size: int, rng: np.random.Generator) -> Iterator[Indices]:
    """Dataset indices of one batch after another, epoch after epoch."""
    lengths = _lengths(dataset)
    window = WINDOW_BATCHES * batch_size
    while True:
        order = rng.permutation(len(lengths)).astype(np.int64)
        for at in range(0, len(order), window):
            near = order[at : at + window]
            near = near[np.argsort(lengths[near], kind="stable")]
            starts = range(0, len(near), batch_size)
            for index in rng.permutation(len(starts)):
                yield near[starts[index] : starts[index] + batch_size]


def _batch(dataset: Dataset, chosen: Indices) -> Batch:
    examples = [dataset.examples[index] for index in chosen]
    width = bucket_length(max(len(example.ids) for example in examples), dataset.max_tokens)  # s
    input_ids = np.full((len(examples), width), dataset.pad_id, np.int64)
    attention_mask = np.zeros_like(input_ids)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.ids)] = example.ids
        attention_mask[row, : len(example.ids)] = 1
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        rows=np.concatenate([row * width + example.rows for row, example in enumerate(examples)]),
        labels=np.concatenate([example.labels for example in examples]),
        examples=chosen,
    )
