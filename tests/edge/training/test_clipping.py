"""The plan's bound on the norm of a whole change: kept by every device, with rounding to codes and without."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.training.clipping import clip_update
from edge_runtime.training.job import RESIDUAL_NAME, Event, Notice
from edge_runtime.training.quantise import quantise
from edge_runtime.training.round import run_round
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import Layout, Quantisation, Update, UpdateValueError, decode_update, norm_of
from edge_runtime.wire.codes import largest_code
from tests.edge.encrypted import tensors_in
from tests.edge.training.test_round import make_job, make_plan

VALUES = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40).map(lambda v: np.array(v, np.float32))
BOUNDS = st.floats(1e-3, 30)


@given(VALUES, BOUNDS)
def test_a_change_is_scaled_down_to_the_bound_and_never_up(change: np.ndarray, bound: float) -> None:
    clipped = clip_update(change, max_norm=bound)
    norm = norm_of(change)
    assert clipped.norm == norm
    assert norm_of(clipped.values) <= bound
    assert clipped.values.dtype == np.float32
    if norm <= bound:
        assert clipped.values is change
    else:
        np.testing.assert_allclose(clipped.values, change * (bound / norm), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_not_scaled(value: float) -> None:
    with pytest.raises(UpdateValueError, match="expected finite"):
        clip_update(np.array([1.0, value], np.float32), max_norm=1.0)


@given(
    st.sampled_from([4, 8]),
    VALUES,
    st.lists(st.floats(-2, 2, width=32), min_size=40, max_size=40),
    BOUNDS,
    st.integers(0, 99),
)
def test_codes_are_within_the_bound_too(
    bits: int, change: np.ndarray, left: list[float], bound: float, seed: int
) -> None:
    """Whatever is left of earlier changes, and though rounding enlarges; what is sent and kept is the scaled change."""
    layout = Layout((("m.lora_b", (len(change),)),), Quantisation(bits, (2.0,)))  # type: ignore[arg-type]
    residual = np.array(left[: len(change)], np.float32)
    found = quantise(change, layout, {"m.lora_b": residual}, rng=np.random.default_rng(seed), max_norm=bound)
    assert norm_of(found.values) <= bound
    step = 2.0 / largest_code(bits)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.values / step, np.rint(found.values / step), atol=1e-4)
    wanted = change.astype(np.float64) + residual
    wanted *= min(1.0, bound / max(float(np.linalg.norm(wanted)), 1e-300))
    np.testing.assert_allclose(found.residual["m.lora_b"], np.clip(wanted - found.values, -2, 2), atol=1e-4)


def test_a_bound_below_every_code_sends_nothing_and_keeps_all() -> None:
    """No code is small enough: after some tries it is rounded towards zero."""
    layout = Layout((("m.lora_b", (500,)),), Quantisation(4, (7.0,)))
    change = np.full(500, 0.9, np.float32)
    found = quantise(change, layout, {}, rng=np.random.default_rng(0), max_norm=0.5)
    assert not found.values.any()
    assert norm_of(found.residual["m.lora_b"]) == pytest.approx(0.5, rel=1e-5)


@pytest.fixture
def bundle(bert_bundle: Path) -> Bundle:
    return open_bundle(bert_bundle)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_round_keeps_the_plans_bound(bundle: Bundle, tmp_path: Path, bits: int | None) -> None:
    """A trained change of another norm has its direction, and the user is told."""
    free = make_plan(bundle, "B")
    job, signed = make_job(tmp_path, bundle, free)
    layout = WorkingBundle(bundle).plan_layout(free)
    frame, _ = run_round(job, lambda event: None)
    change = decode_update(frame, signed_plan=signed, layout=layout).values
    bound = norm_of(change) / 3
    plan = msgspec.structs.replace(free, update=msgspec.structs.replace(free.update, max_norm=bound))
    if bits is not None:
        codes = Quantisation(bits, (float(np.abs(change).max()),) * len(layout.blocks))  # type: ignore[arg-type]
        plan = msgspec.structs.replace(plan, quantisation=codes)
    job, signed = make_job(tmp_path, bundle, plan)
    said: list[Event] = []
    frame, _ = run_round(job, said.append)
    update: Update = decode_update(frame, signed_plan=signed, layout=WorkingBundle(bundle).plan_layout(plan))
    cosine = float(np.dot(update.values, change)) / (norm_of(update.values) * norm_of(change))
    assert 0.5 * bound < norm_of(update.values) <= bound
    assert cosine > (0.5 if bits == 4 else 0.99)
    told = [event.text for event in said if isinstance(event, Notice)]
    assert [text.startswith("the change was scaled down from norm ") for text in told].count(True) == 1
    left = tmp_path / RESIDUAL_NAME
    assert (bits is None) == (not left.exists() or not tensors_in(left, "residual"))


def test_a_change_within_the_bound_is_sent_as_it_is(bundle: Bundle, tmp_path: Path) -> None:
    free = make_plan(bundle, "B")
    found = []
    for plan in (free, msgspec.structs.replace(free, update=msgspec.structs.replace(free.update, max_norm=1e3))):
        job, signed = make_job(tmp_path, bundle, plan)
        frame, _ = run_round(job, lambda event: None)
        layout = WorkingBundle(bundle).plan_layout(plan)
        found.append(decode_update(frame, signed_plan=signed, layout=layout).values)
    np.testing.assert_array_equal(*found)


def test_scaling_hides_no_training_that_diverged(bundle: Bundle, tmp_path: Path) -> None:
    plan = make_plan(bundle, "B", lr_b=5.0, steps=3)
    plan = msgspec.structs.replace(plan, update=msgspec.structs.replace(plan.update, max_norm=1.0))
    job, _ = make_job(tmp_path, bundle, plan)
    with pytest.raises(UpdateValueError, match="within ±8"):
        run_round(job, lambda event: None)
