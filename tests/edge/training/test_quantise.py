"""Stochastic rounding is unbiased, and with error feedback nothing of what a device learned is lost for good."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundle import TensorFileError, encode_tensors
from edge_runtime.training.carried import fitting, read_carried
from edge_runtime.training.quantise import quantise, stochastic_codes
from edge_runtime.wire import Layout, Quantisation
from edge_runtime.wire.codes import Bits, largest_code
from tests.edge.encrypted import VAULT, write_tensors_to

BITS = st.sampled_from([4, 8])


def layout_of_one(count: int, bits: Bits, range_: float) -> Layout:
    return Layout((("m.lora_b", (count,)),), Quantisation(bits, (range_,)))


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_unbiased(bits: Bits) -> None:
    """The mean of many roundings is the value: off by less than five standard errors, at 41 places over the range."""
    most, draws = largest_code(bits), 100_000
    wanted = np.linspace(-most, most, 41)
    found = stochastic_codes(np.repeat(wanted[:, None], draws, axis=1), most, np.random.default_rng(1)).mean(axis=1)
    share = wanted - np.floor(wanted)
    error = np.sqrt(share * (1 - share) / draws)
    assert (np.abs(found - wanted) <= 5 * error).all()
    assert error.max() < 0.002
    assert (found != np.rint(wanted)).sum() > 30  # nearest rounding, too, would be right on whole numbers


@given(BITS, st.floats(1e-6, 8), st.lists(st.floats(-20, 20), min_size=1, max_size=8), st.integers(0, 99))
def test_what_is_sent_and_what_is_left_make_up_the_change(
    bits: Bits, range_: float, changes: list[float], seed: int
) -> None:
    """Also beyond the range, except for what would owe more than one range."""
    change = np.array(changes, np.float32)
    layout = layout_of_one(len(change), bits, range_)
    found = quantise(change, layout, {}, rng=np.random.default_rng(seed))
    left = found.residual["m.lora_b"]
    step = range_ / largest_code(bits)
    codes = found.values / step
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert np.abs(np.rint(codes)).max() <= largest_code(bits)
    owed = change.astype(np.float64) - found.values
    np.testing.assert_allclose(left, np.clip(owed, -range_, range_), rtol=1e-6, atol=1e-30)
    inside = np.abs(change) <= range_
    assert (np.abs(owed[inside]) <= step * (1 + 1e-6)).all()
    np.testing.assert_array_equal(found.values[change > range_], np.float32(largest_code(bits) * step))


def sparse_layout(density: float, *, range_: float = 7.0) -> Layout:
    blocks = (("m.lora_a", (2, 4)), ("m.lora_b", (4, 2)))
    return Layout(blocks, Quantisation(4, (range_, range_), density))


def test_the_largest_values_are_sent_whatever_block_they_are_in() -> None:
    """The others wait, whole; what is equal at the border is taken from the front."""
    change = np.array([1, -5, 0, 2, 0, 0, 3, 0, 0, 3, 0, 0, -3, 0, 0, 1], np.float32)
    found = quantise(change, sparse_layout(0.25), {}, rng=np.random.default_rng(0))
    sent = np.flatnonzero(found.values)
    assert sent.tolist() == [1, 6, 9, 12]
    np.testing.assert_array_equal(found.values[sent], change[sent])  # whole codes are not rounded
    left = np.concatenate([found.residual[name].ravel() for name in ("m.lora_a", "m.lora_b")])
    np.testing.assert_array_equal(left + found.values, change)
    equal = quantise(np.full(16, 2, np.float32), sparse_layout(0.25), {}, rng=np.random.default_rng(0))
    assert np.flatnonzero(equal.values).tolist() == [0, 1, 2, 3]


def test_what_is_always_small_is_sent_in_the_end() -> None:
    """A value that moves a little every round adds up until it is among the largest."""
    rng, residual = np.random.default_rng(3), dict[str, np.ndarray]()
    change = np.concatenate([[0.2], np.full(15, 0.01)]).astype(np.float32)
    layout, total = sparse_layout(0.1, range_=0.7), np.zeros(16)
    for _ in range(400):
        found = quantise(change, layout, residual, rng=rng)
        assert np.count_nonzero(found.values) <= 2
        residual, total = found.residual, total + found.values
    owed = np.concatenate([residual["m.lora_a"].ravel(), residual["m.lora_b"].ravel()])
    np.testing.assert_allclose(total + owed, 400 * change, rtol=1e-4)
    assert (total[1:] > 0.8 * 400 * 0.01).all()


def test_a_bound_on_the_norm_holds_for_what_is_sent() -> None:
    change = np.linspace(-4, 4, 16, dtype=np.float32)
    found = quantise(change, sparse_layout(0.5), {}, rng=np.random.default_rng(0), max_norm=2.0)
    assert 0 < np.linalg.norm(found.values) <= 2.0
    assert np.count_nonzero(found.values) <= 8


@given(BITS, st.floats(-0.9, 0.9), st.integers(1, 60), st.integers(0, 99))
def test_what_was_sent_tends_to_the_sum_of_the_changes(bits: Bits, change: float, rounds: int, seed: int) -> None:
    """A change that comes again every round is sent in full but for one step, however many rounds and however small."""
    layout, rng = layout_of_one(3, bits, 1.0), np.random.default_rng(seed)
    every, total, residual = np.full(3, change, np.float32), np.zeros(3), {}
    for _ in range(rounds):
        found = quantise(every, layout, residual, rng=rng)
        total, residual = total + found.values, found.residual
    assert (np.abs(total - rounds * every.astype(np.float64)) <= 1 / largest_code(bits) + 1e-5 * rounds).all()


@given(BITS, st.floats(1.5, 8), st.integers(0, 99))
def test_what_did_not_fit_is_sent_later(bits: Bits, change: float, seed: int) -> None:
    """One change beyond the range, then none: twice the range at most arrives, and after it nothing more."""
    layout, rng = layout_of_one(1, bits, 1.0), np.random.default_rng(seed)
    found = quantise(np.array([change], np.float32), layout, {}, rng=rng)
    total = found.values.astype(np.float64)
    for _ in range(60):
        found = quantise(np.zeros(1, np.float32), layout, found.residual, rng=rng)
        total += found.values
    step = 1 / largest_code(bits)
    assert abs(total[0] - min(change, 2.0)) <= step + 1e-5
    assert abs(found.residual["m.lora_b"][0]) <= step + 1e-5


def test_a_residual_never_runs_away() -> None:
    layout, rng, residual = layout_of_one(2, 8, 0.5), np.random.default_rng(0), {}
    for _ in range(50):
        residual = quantise(np.array([3.0, -3.0], np.float32), layout, residual, rng=rng).residual
    np.testing.assert_allclose(residual["m.lora_b"], [0.5, -0.5], rtol=1e-6)


def test_every_block_has_its_own_range_and_the_dead_keep_what_they_are_owed() -> None:
    """Blocks of other shapes and ranges; the residual of a tensor that is not alive comes out as it went in."""
    layout = Layout((("m.lora_a", (2, 3)), ("m.lora_b", (4, 2))), Quantisation(8, (1.27, 0.0127)))
    change = np.concatenate([np.full(6, 0.5), np.full(8, 0.005)]).astype(np.float32)
    before = {"m.lora_b": np.full((4, 2), 0.001, np.float32), "n.lora_b": np.full((1, 2), 9.0, np.float32)}
    found = quantise(change, layout, before, rng=np.random.default_rng(0))
    parts = layout.split(found.values)
    np.testing.assert_allclose(parts["m.lora_a"], np.full((2, 3), 0.5), atol=0.0101)
    np.testing.assert_allclose(parts["m.lora_b"], np.full((4, 2), 0.006), atol=0.000101)
    assert found.residual["m.lora_a"].shape == (2, 3)
    assert found.residual["n.lora_b"] is before["n.lora_b"]
    assert set(found.residual) == {"m.lora_a", "m.lora_b", "n.lora_b"}


def test_ternary_codes_are_the_nearest_ones() -> None:
    """From half a range on; what they lose is owed, and what is large is sent in several rounds."""
    change = np.array([0.49, 0.51, -0.49, -0.51, 3.0, -20.0], np.float32)
    layout, rng = layout_of_one(6, 2, 1.0), np.random.default_rng(0)
    found = quantise(change, layout, {}, rng=rng)
    np.testing.assert_array_equal(found.values, [0, 1, 0, -1, 1, -1])
    np.testing.assert_allclose(found.residual["m.lora_b"], [0.49, -0.49, -0.49, 0.49, 2.0, -8.0], rtol=1e-6)
    total = found.values.astype(np.float64)
    for _ in range(10):
        found = quantise(np.zeros(6, np.float32), layout, found.residual, rng=rng)
        total += found.values
    np.testing.assert_array_equal(total, [0, 1, 0, -1, 3, -9])  # one range, and the eight that may be owed


def test_the_mean_of_ternary_updates_tends_to_the_mean_of_the_changes() -> None:
    """Twenty devices that move alike in part, ten rounds: what they keep makes up for most of what rounding loses."""
    rng, layout = np.random.default_rng(4), layout_of_one(400, 2, 1.2)
    common, residuals = rng.normal(size=400), [{} for _ in range(20)]
    kept, lost = np.zeros(400), np.zeros(400)
    for _ in range(10):
        for device, residual in enumerate(residuals):
            change = (0.5 * common + 0.85 * rng.normal(size=400)).astype(np.float32)
            found = quantise(change, layout, residual, rng=rng)
            residuals[device], kept = found.residual, kept + (change - found.values) / 20
            lost += (change - quantise(change, layout, {}, rng=rng).values) / 20
    size = np.linalg.norm(10 * 0.5 * common)
    assert np.linalg.norm(kept) < 0.12 * size
    assert np.linalg.norm(kept) < 0.6 * np.linalg.norm(lost)


def test_a_bound_on_the_norm_holds_for_ternary_codes() -> None:
    change = np.linspace(-4, 4, 16, dtype=np.float32)
    found = quantise(change, layout_of_one(16, 2, 1.0), {}, rng=np.random.default_rng(0), max_norm=2.5)
    assert 0 < np.linalg.norm(found.values) <= 2.5


def test_devices_round_differently_and_one_seed_alike() -> None:
    change, layout = np.linspace(-1, 1, 200).astype(np.float32), layout_of_one(200, 4, 1.0)
    first, again, other = (quantise(change, layout, {}, rng=np.random.default_rng(seed)).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).sum() > 20


def test_a_layout_without_ranges_is_refused() -> None:
    with pytest.raises(ValueError, match="no ranges"):
        quantise(np.zeros(2, np.float32), Layout((("a", (2,)),)), {}, rng=np.random.default_rng(0))


def test_a_residual_of_another_shape_is_refused() -> None:
    """A column that numpy would spread over three is no residual of theirs."""
    layout = Layout((("m.lora_b", (2, 3)),), Quantisation(4, (1.0,)))
    with pytest.raises(ValueError, match=r"residual of m.lora_b: expected shape \(2, 3\), got \(2, 1\)"):
        quantise(np.zeros(6, np.float32), layout, {"m.lora_b": np.ones((2, 1))}, rng=np.random.default_rng(0))


def test_residuals_of_other_ranks_are_dropped_by_name() -> None:
    residual = {name: np.zeros(shape, np.float32) for name, shape in {"a": (2, 3), "b": (3, 2), "c": (2,)}.items()}
    left, others = fitting(residual, {"a": (2, 3), "b": (2, 2), "d": (1,)})
    assert set(left) == {"a"}
    assert others == ("b", "c")


def test_no_file_is_no_residual(tmp_path: Path) -> None:
    assert read_carried(VAULT, "residual", tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too short"),
        (b"rot" * 20, "header length"),
        (encode_tensors({"a": np.array([1.0, np.nan], np.float32)}), "a: expected finite float32"),
        (encode_tensors({"a": np.array([1], np.int8)}), "a: expected finite float32"),
    ],
)
def test_a_damaged_residual_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    write_tensors_to(tmp_path / "residual", "residual", data)
    with pytest.raises(TensorFileError, match=message):
        read_carried(VAULT, "residual", tmp_path / "residual")


def test_what_is_left_of_components_that_are_not_trained_stays() -> None:
    """Column 2 of three is trained: only it is paid back, and only it owes anew."""
    layout = Layout((("m.lora_b", (4, 1)),), Quantisation(4, (0.7,)), {"m.lora_b": (2,)})
    before = {"m.lora_b": np.array([[0.01, 0.02, 0.03]] * 4, np.float32)}
    found = quantise(np.full(4, 0.12, np.float32), layout, before, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(found.residual["m.lora_b"][:, :2], before["m.lora_b"][:, :2])
    np.testing.assert_allclose(found.values + found.residual["m.lora_b"][:, 2], 0.15, rtol=1e-6)
