"""Batches. The laws, for any dataset and any batch size:

- an epoch has every example exactly once, and so has an evaluation
- padding is never attended to and never trained
- over an epoch the rows of the batches are the trained tokens of the dataset
- a batch is as long as its bucket says
- the same generator gives the same batches
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.data import (
    Batch,
    Dataset,
    DatasetReport,
    Example,
    bucket_length,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)

MAX_TOKENS = 40
PAD = 77


def dataset_of(examples: Iterable[Example]) -> Dataset:
    report = DatasetReport(
        files=(),
        task="lm",
        max_tokens=MAX_TOKENS,
        examples=0,
        tokens=0,
        trained_tokens=0,
        truncated=0,
        dropped=0,
        bad_count=0,
        bad_lines=(),
        ignored_fields=(),
        label_counts={},
    )
    return Dataset(tuple(examples), report, PAD, MAX_TOKENS)


def lm_example(trained: list[bool]) -> Example:
    mask = np.array([False, *trained[:-1], True])
    return Example(np.arange(100, 100 + len(mask), dtype=np.int32), mask, False)


def class_example(length: int, label: int) -> Example:
    return Example(np.arange(100, 100 + length, dtype=np.int32), label, False)


lm_data = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=MAX_TOKENS - 1).map(lm_example), min_size=1, max_size=40
)
class_data = st.lists(st.builds(class_example, st.integers(1, MAX_TOKENS), st.integers(-1, 5)), min_size=1, max_size=40)
datasets = st.one_of(lm_data, class_data).map(dataset_of)


def content(batch: Batch) -> tuple[bytes, ...]:
    return tuple(each.tobytes() for each in (batch.input_ids, batch.attention_mask, batch.rows, batch.labels))


def check(batch: Batch, data: Dataset) -> None:
    """Everything a batch must be, written out position by position."""
    size, width = batch.input_ids.shape
    arrays = (batch.input_ids, batch.attention_mask, batch.rows, batch.labels, batch.examples)
    assert all(array.dtype == np.int64 for array in arrays)
    assert batch.attention_mask.shape == (size, width)
    assert batch.rows.shape == batch.labels.shape == (batch.weight,)
    assert batch.examples.shape == (size,)
    longest = max(len(data.examples[index].ids) for index in batch.examples)
    assert longest <= width == bucket_length(longest, MAX_TOKENS)
    expected = []
    for row, index in enumerate(batch.examples):
        example = data.examples[index]
        length = len(example.ids)
        assert batch.input_ids[row].tolist() == example.ids.tolist() + [PAD] * (width - length)
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (width - length)
        if isinstance(example.targets, int):
            expected.append((row * width, example.targets))
        else:
            places = [place for place in range(length) if example.targets[place]]
            expected += [(row * width + place - 1, int(example.ids[place])) for place in places]
    assert list(zip(batch.rows.tolist(), batch.labels.tolist(), strict=True)) == expected
    assert (batch.attention_mask.reshape(-1)[batch.rows] == 1).all()


@given(tokens=st.integers(1, 5000), room=st.integers(0, 5000))
def test_a_bucket_holds_its_rows_and_wastes_little(tokens: int, room: int) -> None:
    """It is never above the limit, never wastes an eighth, and is its own bucket."""
    limit = tokens + room
    length = bucket_length(tokens, limit)
    assert tokens <= length <= limit
    assert length - tokens < tokens / 8
    assert bucket_length(length, limit) == length


def test_the_buckets_are_few() -> None:
    """Up to 2,048 tokens there are 72 lengths; multiples of 16 would be 128."""
    lengths = {bucket_length(tokens, 2048) for tokens in range(1, 2049)}
    assert len(lengths) == 72
    assert {1, 16, 18, 32, 36, 64, 72, 128, 144, 256, 288, 2048} <= lengths


@given(data=datasets, batch_size=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_each_epoch_visits_every_example_once(data: Dataset, batch_size: int, seed: int) -> None:
    a_pass = steps_per_epoch(data, batch_size)
    rng = np.random.default_rng(seed)
    batches = list(training_batches(data, batch_size, steps=3 * a_pass, rng=rng))
    assert len(batches) == 3 * a_pass
    for epoch in range(3):
        part = batches[epoch * a_pass : (epoch + 1) * a_pass]
        assert sorted(np.concatenate([batch.examples for batch in part])) == list(range(len(data)))
        assert sum(batch.weight for batch in part) == data.weight
        short = [len(batch.examples) for batch in part if len(batch.examples) != batch_size]
        assert short == [len(data) % batch_size] * (len(data) % batch_size > 0)
    for batch in batches:
        check(batch, data)


@given(data=datasets, batch_size=st.integers(1, 9))
def test_evaluation_visits_every_example_once_the_shortest_first(data: Dataset, batch_size: int) -> None:
    batches = list(evaluation_batches(data, batch_size))
    order = np.concatenate([batch.examples for batch in batches]).tolist()
    assert sorted(order) == list(range(len(data)))
    keys = [(len(data.examples[index].ids), index) for index in order]
    assert all(before < after for before, after in pairwise(keys))
    assert len(batches) == steps_per_epoch(data, batch_size)
    assert sum(batch.weight for batch in batches) == data.weight
    for batch in batches:
        check(batch, data)


@given(data=datasets, batch_size=st.integers(1, 9), steps=st.integers(0, 30), seed=st.integers(0, 99))
def test_the_same_generator_gives_the_same_batches(data: Dataset, batch_size: int, steps: int, seed: int) -> None:
    once = training_batches(data, batch_size, steps=steps, rng=np.random.default_rng(seed))
    again = training_batches(data, batch_size, steps=steps + 5, rng=np.random.default_rng(seed))
    assert [content(batch) for batch in once] == [content(batch) for batch in islice(again, steps)]


def test_every_epoch_is_another_permutation() -> None:
    data = dataset_of(class_example(3, index) for index in range(50))
    batches = list(training_batches(data, 50, steps=3, rng=np.random.default_rng(0)))
    orders = {tuple(batch.examples) for batch in batches}
    assert len(orders) == 3
    other = next(iter(training_batches(data, 50, steps=1, rng=np.random.default_rng(1))))
    assert tuple(other.examples) not in orders


def test_like_lengths_go_together_and_the_batches_come_shuffled() -> None:
    """A dataset of 64 short and 64 long examples is hardly padded, and is not seen short ones first."""
    data = dataset_of(class_example(16 if index % 2 else 40, 0) for index in range(128))
    batches = list(training_batches(data, 8, steps=steps_per_epoch(data, 8), rng=np.random.default_rng(0)))
    padding = sum(int((batch.attention_mask == 0).sum()) for batch in batches)
    assert padding <= 2 * 7 * 24  # at most one mixed batch in each of the two windows; 1,536 without grouping
    widths = [batch.input_ids.shape[1] for batch in batches[:8]]  # the first window
    assert widths != sorted(widths)


def test_the_arrays_of_one_small_batch() -> None:
    examples = [lm_example([False, True]), class_example(2, 4), class_example(17, 1)]
    (first,) = evaluation_batches(dataset_of(examples[:1]), 4)
    assert first.input_ids.tolist() == [[100, 101, 102]]
    assert first.attention_mask.tolist() == [[1, 1, 1]]
    assert (first.rows.tolist(), first.labels.tolist()) == ([1], [102])
    (padded,) = evaluation_batches(dataset_of(examples[2:]), 4)
    assert padded.input_ids[0, 16:].tolist() == [int(examples[2].ids[16]), PAD]
    assert padded.attention_mask[0, 16:].tolist() == [1, 0]
    (second,) = evaluation_batches(dataset_of(examples[1:2] * 2), 4)
    assert (second.rows.tolist(), second.labels.tolist()) == ([0, 2], [4, 4])


def test_numbers_out_of_range_are_refused_at_the_call() -> None:
    data = dataset_of([class_example(2, 0)])
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="batch_size: out of range: expected at least 1, got 0"):
        training_batches(data, 0, steps=1, rng=rng)
    with pytest.raises(ValueError, match="steps: out of range: expected at least 0, got -1"):
        training_batches(data, 1, steps=-1, rng=rng)
    with pytest.raises(ValueError, match="examples: out of range: expected at least 1, got 0"):
        evaluation_batches(dataset_of([]), 1)
