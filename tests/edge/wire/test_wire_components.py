"""Quantised matrices: half a step of error, exact products, and the same codes again, for any finite matrix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_runtime.wire.codes import Bits, largest_code
from edge_runtime.wire.components import SMALLEST_SCALE, code_bits, quantise, restore, rounded, scale_count

NAMES = ("layer.0.q.lora_a", "layer.0.q.lora_b", "classifier.weight")
FINITE = st.floats(-(2.0**127), 2.0**127, width=32)
MATRICES = hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=FINITE)


@given(st.sampled_from(NAMES), MATRICES, st.sampled_from([8, 4]))
def test_no_value_is_off_by_more_than_half_a_step(name: str, values: np.ndarray, bits: Bits) -> None:
    codes, scales = quantise(name, values, bits)
    steps = scales.astype(np.float64)[None, :] if name.endswith("lora_b") else scales.astype(np.float64)[:, None]
    error = np.abs(codes * steps - values.astype(np.float64))
    assert np.all(error <= steps * (0.5 + 1e-12))
    assert np.abs(codes).max() <= largest_code(code_bits(name, bits))
    assert len(scales) == scale_count(name, values.shape)


@given(st.sampled_from(NAMES), MATRICES, st.sampled_from([8, 4]))
def test_what_is_restored_is_exact_and_quantises_to_the_same_again(name: str, values: np.ndarray, bits: Bits) -> None:
    codes, scales = quantise(name, values, bits)
    restored = restore(name, codes, scales)
    wide = scales.astype(np.float64)[None, :] if name.endswith("lora_b") else scales.astype(np.float64)[:, None]
    np.testing.assert_array_equal(restored.astype(np.float64), codes * wide)
    again, same = quantise(name, restored, bits)
    np.testing.assert_array_equal(again, codes)
    assert same.tobytes() == scales.tobytes()
    assert rounded(name, restored, bits).tobytes() == restored.tobytes()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_component_has_a_scale_of_its_own(bits: Bits) -> None:
    """A loud row of A, or column of B, costs its neighbours nothing."""
    rng = np.random.default_rng(0)
    loud = rng.normal(size=(3, 50)).astype(np.float32)
    loud[1] *= 1000
    for name, values in (("m.lora_a", loud), ("m.lora_b", np.ascontiguousarray(loud.T)), ("head.weight", loud)):
        restored = rounded(name, values, bits)
        quiet, exact = ((a[:, [0, 2]] if name == "m.lora_b" else a[[0, 2]]) for a in (restored, values))
        assert np.abs(quiet - exact).max() <= np.abs(exact).max() / largest_code(bits)
        assert np.abs(quiet - exact).max() > 0


def test_a_head_has_no_fewer_than_8_bits() -> None:
    """MiniLM's head of class means lost 0.04 of accuracy on 150 classes in 4."""
    values = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    assert rounded("classifier.weight", values, 4).tobytes() == rounded("classifier.weight", values, 8).tobytes()
    assert 64 <= np.abs(quantise("classifier.weight", values, 4)[0]).max() <= 127


def test_golden_values() -> None:
    values = np.array([[1.0, -0.5, 0.02], [0.0, 0.0, 0.0]], np.float32)
    codes, scales = quantise("m.lora_a", values, 8)
    assert codes.tolist() == [[64, -32, 1], [0, 0, 0]]
    assert scales.tobytes().hex() == "0000803c" + "00008000"  # 1/64, as 1/128 would need a code of 128; the smallest
    assert float(scales[1]) == SMALLEST_SCALE


@pytest.mark.parametrize(("largest", "scale"), [(7.0, 1.0), (7.000001, 2.0), (3.5, 0.5), (4.0, 1.0)])
def test_a_scale_is_the_least_power_of_two_that_will_do(largest: float, scale: float) -> None:
    codes, scales = quantise("m.lora_a", np.array([[largest, 0]], np.float32), 4)
    assert (scales.tolist(), codes.tolist()) == ([scale], [[round(largest / scale), 0]])


@pytest.mark.parametrize("bits", [8, 4])
def test_no_finite_value_becomes_infinite(bits: Bits) -> None:
    values = np.full((1, 2), np.finfo(np.float32).max)
    assert rounded("m.lora_a", values, bits).tolist() == [[2.0**127, 2.0**127]]


def test_what_is_no_matrix_stays_as_it_is() -> None:
    values = np.array([0.1, 0.2, 0.3], np.float32)
    assert scale_count("classifier.bias", values.shape) == 0
    assert rounded("classifier.bias", values, 4) is values
