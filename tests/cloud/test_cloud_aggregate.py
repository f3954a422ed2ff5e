"""The sum is exact, independent of order, and what np.average says."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.aggregate import UpdateSum, apply_mean
from edge_runtime.wire import Layout, UpdateRules

RULES = UpdateRules()
VALUE = st.floats(-8, 8, width=32)
UPDATES = st.integers(1, 9).flatmap(
    lambda n: st.lists(
        st.tuples(st.lists(VALUE, min_size=n, max_size=n), st.integers(1, 100_000)), min_size=1, max_size=8
    )
)


def summed(updates: list[tuple[list[float], int]]) -> UpdateSum:
    total = UpdateSum(len(updates[0][0]), RULES)
    for values, weight in updates:
        total.add(np.array(values, np.float32), weight)
    return total


@given(UPDATES, st.randoms(use_true_random=False))
def test_order_and_grouping_do_not_matter(updates: list, random: object) -> None:
    """Commutative, associative, identity."""
    expected = summed(updates).mean()
    shuffled = list(updates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert np.array_equal(summed(shuffled).mean(), expected)
    half = len(updates) // 2
    merged = UpdateSum(len(updates[0][0]), RULES)
    for part in (updates[:half], updates[half:]):
        if part:
            merged.merge(summed(part))
    assert np.array_equal(merged.mean(), expected)
    assert merged.weight == summed(updates).weight


@given(UPDATES)
def test_mean_is_exact_up_to_the_rounding_of_each_value(updates: list) -> None:
    """Against rationals: every value rounded to 2**-32 once, then nothing more is lost than one float64."""
    weights = [min(weight, RULES.weight_cap) for _, weight in updates]
    mean = summed(updates).mean()
    for index in range(len(mean)):
        exact = sum(Fraction(v[index]) * w for (v, _), w in zip(updates, weights, strict=True)) / sum(weights)
        assert abs(Fraction(float(mean[index])) - exact) <= Fraction(1, 2**33) + Fraction(1, 2**48)


def test_large_sum_equals_numpy_average() -> None:
    rng = np.random.default_rng(1)
    updates = rng.uniform(-8, 8, size=(20, 200_000)).astype(np.float32)
    weights = rng.integers(1, 5000, size=20)
    total = UpdateSum(updates.shape[1], RULES)
    for values, weight in zip(updates, weights, strict=True):
        total.add(values, int(weight))
    np.testing.assert_allclose(total.mean(), np.average(updates.astype(np.float64), axis=0, weights=weights), atol=1e-9)


@settings(max_examples=5)
@given(st.sampled_from([-8.0, 8.0]))
def test_bounds_leave_room_for_the_worst_case(extreme: float) -> None:
    """As many devices as the rules allow, each at both bounds: nothing overflows."""
    total = UpdateSum(3, RULES)
    for _ in range(RULES.max_devices):
        total.add(np.full(3, extreme, np.float32), 10**9)
    assert np.array_equal(total.mean(), np.full(3, extreme))
    with pytest.raises(ValueError, match="room for 1024 devices"):
        total.add(np.zeros(3, np.float32), 1)


def test_other_shape_is_refused_and_changes_nothing() -> None:
    total = summed([([1.0, 2.0], 1)])
    with pytest.raises(ValueError, match="expected values of shape"):
        total.add(np.zeros(3, np.float32), 1)
    with pytest.raises(ValueError, match="expected shape"):
        total.merge(UpdateSum(3, RULES))
    assert (total.devices, total.weight, total.mean().tolist()) == (1, 1, [1.0, 2.0])


def test_apply_moves_trained_components_only() -> None:
    """Rows of A, columns of B; the rest of the tensor is bit-identical, and the adapter that was given too."""
    layout = Layout((("m.lora_a", (1, 3)), ("m.lora_b", (2, 2))), None, {"m.lora_a": (1,), "m.lora_b": (0, 2)})
    adapter = {"m.lora_a": np.ones((3, 3), np.float32), "m.lora_b": np.ones((2, 3), np.float32)}
    new = apply_mean(adapter, layout, np.arange(1.0, 8.0))
    assert new["m.lora_a"].tolist() == [[1, 1, 1], [2, 3, 4], [1, 1, 1]]
    assert new["m.lora_b"].tolist() == [[5, 1, 6], [7, 1, 8]]
    assert all((array == 1).all() for array in adapter.values())


def test_apply_moves_alive_blocks_only() -> None:
    layout = Layout((("m.lora_b", (2, 1)), ("head.bias", (2,))))
    adapter = {name: np.ones(shape, np.float32) for name, shape in layout.blocks} | {
        "m.lora_a": np.ones((1, 3), np.float32)
    }
    new = apply_mean(adapter, layout, np.array([0.5, 1.0, 1.5, -1.0]))
    assert new["m.lora_b"].tolist() == [[1.5], [2.0]]
    assert new["head.bias"].tolist() == [2.5, 0.0]
    assert new["m.lora_a"] is adapter["m.lora_a"]
    assert adapter["m.lora_b"].tolist() == [[1.0], [1.0]]
    assert {array.dtype for array in new.values()} == {np.dtype(np.float32)}
