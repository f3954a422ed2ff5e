"""What answers a measuring plan: its layout, its triangle, and counts that count no examples."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import (
    CLASS_COUNTS,
    Update,
    UpdateValueError,
    check_measurement,
    measurement_layout,
    pack_triangle,
    unpack_triangle,
)

# Changing this literal is changing the format: docs/wire.md, Versions.
LAYOUT_TEXT = b"class_sums 2x3\nclass_counts 2\nsecond_moments 6\n"


def test_layout_bytes() -> None:
    layout = measurement_layout(2, 3)
    assert layout.count == 6 + 2 + 6
    assert layout.digest() == hashlib.sha256(LAYOUT_TEXT).digest()


def test_triangle_stands_by_rows() -> None:
    matrix = np.array([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    assert pack_triangle(matrix).tolist() == [1, 2, 3, 4, 5, 6]


@given(st.integers(1, 9), st.integers(0, 9))
def test_triangle_round_trip(features: int, seed: int) -> None:
    half = np.random.default_rng(seed).normal(size=(features, features))
    matrix = half + half.T
    np.testing.assert_array_equal(unpack_triangle(pack_triangle(matrix), features), matrix)


def measured(counts: list[float], weight: int) -> tuple[Update, object]:
    layout = measurement_layout(len(counts), 2)
    values = np.full(layout.count, -0.5, np.float32)  # other sums may be anything
    layout.split(values)[CLASS_COUNTS][:] = counts
    return Update(values, weight), layout


@pytest.mark.parametrize(("counts", "weight"), [([3, 0, 4], 7), ([0, 1, 0], 1), ([2**23, 2**23 - 1, 1], 2**24)])
def test_whole_counts_are_taken(counts: list[float], weight: int) -> None:
    check_measurement(*measured(counts, weight))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("counts", "weight"), [([3, 0, 4], 8), ([3, -1, 4], 6), ([2.5, 0.5, 4], 7), ([0, 0, 0], 1), ([3, 0, 4], 6)]
)
def test_counts_that_count_no_examples_are_refused(counts: list[float], weight: int) -> None:
    with pytest.raises(UpdateValueError, match=f"class counts: .* add up to the weight {weight}, got "):
        check_measurement(*measured(counts, weight))  # type: ignore[arg-type]
