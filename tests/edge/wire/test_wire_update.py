"""An update frame counts only if every field of it is the plan's; each way of being wrong has its error."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_runtime.wire import (
    Layout,
    LocalMetrics,
    ModulePlan,
    Plan,
    PlanFormatError,
    SignedPlan,
    Update,
    UpdateError,
    UpdateFormatError,
    UpdateLayoutError,
    UpdateNormError,
    UpdatePlanError,
    UpdateRules,
    UpdateValueError,
    check_values,
    decode_update,
    encode_update,
    layout_of,
    norm_of,
    sign_plan,
)

VALUES, TRAILER = 88, 88 + 4 * 14  # offsets in the frame of 14 values
NAN, INFINITY, NINE = (struct.pack("<f", value) for value in (math.nan, math.inf, 9.0))


@pytest.fixture(scope="module")
def frame(signed: SignedPlan, layout: Layout, update: Update) -> bytes:
    return encode_update(update, signed_plan=signed, layout=layout)


@pytest.mark.parametrize(
    ("offset", "put", "error", "message"),
    [
        (0, b"EMBERUPE", UpdateFormatError, "got b'EMBERUPE' version 1"),
        (8, b"\x02", UpdateFormatError, "got b'EMBERUPD' version 2"),
        (10, b"\x01", UpdateFormatError, "tier: expected 0, or another one of the plan's, got 1"),
        (12, b"\x08", UpdatePlanError, "expected round 7 .*, got 8"),
        (16, b"\x00", UpdatePlanError, "of plan 5f1e885de64f, got 7 of 001e885de64f"),
        (48, b"\xff", UpdateLayoutError, "of layout 00b0c1f1d6e9, got 14 of ffb0c1f1d6e9"),
        (80, b"\x0d", UpdateLayoutError, "expected 14 values .*, got 13"),
        (80, b"\xff" * 8, UpdateLayoutError, "got 18446744073709551615"),
        (VALUES, NAN, UpdateValueError, "values"),
        (VALUES + 52, INFINITY, UpdateValueError, "got -1.0 to inf"),
        (VALUES + 52, NINE, UpdateValueError, "within ±8.0, got -1.0 to 9.0"),
        (VALUES + 4, struct.pack("<f", -9.0), UpdateValueError, "got -9.0 to 2.25"),
        (TRAILER, bytes(8), UpdateValueError, "weight: expected at least 1, got 0"),
        (TRAILER + 16, b"\x65", UpdateValueError, "metrics: expected at most 100 correct examples, got 101"),
    ],
)
def test_wrong_field_is_named(
    frame: bytes, signed: SignedPlan, layout: Layout, offset: int, put: bytes, error: type[UpdateError], message: str
) -> None:
    hostile = frame[:offset] + put + frame[offset + len(put) :]
    with pytest.raises(error, match=message) as caught:
        decode_update(hostile, signed_plan=signed, layout=layout)
    assert type(caught.value) is error


def test_length_is_exact(frame: bytes, signed: SignedPlan, layout: Layout) -> None:
    for wrong in (b"", frame[:8], frame[:147], frame[:148], frame[:-1], frame + b"\0", frame + bytes(1 << 20)):
        with pytest.raises(UpdateFormatError, match=f"expected {len(frame)} bytes, got {len(wrong)}"):
            decode_update(wrong, signed_plan=signed, layout=layout)


def test_update_of_another_signature_of_the_same_plan_is_refused(
    frame: bytes, plan: Plan, layout: Layout, signing_key: Ed25519PrivateKey
) -> None:
    other = sign_plan(msgspec.structs.replace(plan, seed=43), signing_key)
    with pytest.raises(UpdatePlanError, match=other.digest[:12]):
        decode_update(frame, signed_plan=other, layout=layout)


def test_values_are_a_read_only_view(frame: bytes, signed: SignedPlan, layout: Layout) -> None:
    """Decoding copies nothing, so memory is that of the frame."""
    values = decode_update(frame, signed_plan=signed, layout=layout).values
    assert not values.flags.owndata
    assert not values.flags.writeable


def test_encode_refuses_another_number_of_values(signed: SignedPlan, layout: Layout) -> None:
    for shape in ((13,), (14, 1), (2, 7), ()):
        with pytest.raises(UpdateLayoutError, match="expected 14 values"):
            encode_update(Update(np.zeros(shape, np.float32), 1), signed_plan=signed, layout=layout)


def test_infinite_metric_is_not_measured(signed: SignedPlan, layout: Layout, update: Update) -> None:
    diverged = dataclasses.replace(update, metrics=LocalMetrics(loss_end=math.inf, seconds=1.0))
    data = encode_update(diverged, signed_plan=signed, layout=layout)
    assert decode_update(data, signed_plan=signed, layout=layout).metrics == LocalMetrics(seconds=1.0)


def test_layout_follows_the_plan() -> None:
    modules = [ModulePlan("m", 2, "AB"), ModulePlan("n", 3, "A"), ModulePlan("o", 1, ""), ModulePlan("p", 4, "B")]
    features = dict.fromkeys("mnop", (5, 7))
    layout = layout_of(modules, features, {"head.weight": (2, 3)})
    assert layout.blocks == (
        ("m.lora_a", (2, 5)),
        ("m.lora_b", (7, 2)),
        ("n.lora_a", (3, 5)),
        ("p.lora_b", (7, 4)),
        ("head.weight", (2, 3)),
    )
    parts = layout.split(np.arange(layout.count))
    assert {name: part.shape for name, part in parts.items()} == dict(layout.blocks)
    np.testing.assert_array_equal(np.concatenate([part.ravel() for part in parts.values()]), np.arange(layout.count))


def test_layout_has_trained_components_only() -> None:
    """Rows of A, columns of B; ``where`` finds them in the whole tensor, and all of any other."""
    modules = [ModulePlan("m", 4, "AB", (1, 3)), ModulePlan("n", 4, "B")]
    layout = layout_of(modules, dict.fromkeys("mn", (5, 7)), {"head.weight": (2, 3)})
    assert layout.blocks == (
        ("m.lora_a", (2, 5)),
        ("m.lora_b", (7, 2)),
        ("n.lora_b", (7, 4)),
        ("head.weight", (2, 3)),
    )
    whole = {"m.lora_a": (4, 5), "m.lora_b": (7, 4), "n.lora_b": (7, 4), "head.weight": (2, 3)}
    tensors = {name: np.arange(np.prod(shape)).reshape(shape) for name, shape in whole.items()}
    assert tensors["m.lora_a"][layout.where("m.lora_a")].tolist() == [list(range(5, 10)), list(range(15, 20))]
    assert tensors["m.lora_b"][layout.where("m.lora_b")].tolist() == [[4 * i + 1, 4 * i + 3] for i in range(7)]
    for name, shape in layout.blocks:
        assert tensors[name][layout.where(name)].shape == shape
    assert len({layout, layout_of(modules, dict.fromkeys("mn", (5, 7)), {"head.weight": (2, 3)})}) == 1


def test_layout_of_an_unknown_module_is_refused() -> None:
    with pytest.raises(PlanFormatError, match=r"module 'n': the bundle has no such module"):
        layout_of([ModulePlan("n", 1, "")], {"m": (1, 1)}, {})


def test_nothing_alive_is_an_update_of_no_values(signed: SignedPlan) -> None:
    layout = layout_of([], {}, {})
    data = encode_update(Update(np.zeros(0, np.float32), 1), signed_plan=signed, layout=layout)
    assert len(data) == 148
    assert decode_update(data, signed_plan=signed, layout=layout).values.shape == (0,)


def test_bound_is_inclusive() -> None:
    rules = UpdateRules(max_abs=0.5)
    check_values(np.array([0.5, -0.5], np.float32), 1, rules)
    with pytest.raises(UpdateValueError):
        check_values(np.array([np.nextafter(np.float32(0.5), np.float32(1))]), 1, rules)


def test_the_bound_of_the_norm_is_inclusive_and_of_the_whole_change() -> None:
    rules = UpdateRules(max_norm=5.0)
    check_values(np.array([3.0, -4.0], np.float32), 1, rules)
    check_values(np.array([8.0, 8.0], np.float32), 1, UpdateRules())
    with pytest.raises(UpdateNormError, match=r"update: norm: expected at most 5, got 5\.099"):
        check_values(np.array([3.0, -4.0, 1.0], np.float32), 1, rules)


def test_a_frame_over_the_bound_of_the_norm_is_refused(
    update: Update, plan: Plan, layout: Layout, signing_key: Ed25519PrivateKey
) -> None:
    norm = float(np.linalg.norm(update.values.astype(np.float64)))
    for bound, fits in ((norm * 1.001, True), (norm * 0.999, False)):
        rules = msgspec.structs.replace(plan.update, max_norm=bound)
        signed = sign_plan(msgspec.structs.replace(plan, update=rules), signing_key)
        frame = encode_update(update, signed_plan=signed, layout=layout)
        with contextlib.nullcontext() if fits else pytest.raises(UpdateNormError):
            decode_update(frame, signed_plan=signed, layout=layout)


@given(st.integers(0, 200_000), st.floats(2**-20, 8.0, width=32))
def test_a_norm_is_summed_in_double_precision(count: int, value: float) -> None:
    """Summed in float32 it would be off by a hundredth at some of these lengths, and by another machine's rounding."""
    assert norm_of(np.full(count, value, np.float32)) == pytest.approx(math.sqrt(count) * value, rel=1e-12)


def metrics() -> st.SearchStrategy[LocalMetrics]:
    counts = st.integers(0, 2**32 - 1)
    double = st.none() | st.floats(allow_nan=False, allow_infinity=False)
    single = st.none() | st.floats(allow_nan=False, allow_infinity=False, width=32)
    fields: dict[str, st.SearchStrategy[Any]] = dict.fromkeys(
        ("loss_start", "loss_end", "eval_loss", "seconds"), double
    )
    fields |= dict.fromkeys(("peak_private_mb", "peak_total_mb"), single)
    tried = st.tuples(counts, counts).map(sorted)
    return st.builds(
        lambda steps, pair, measured: LocalMetrics(steps, pair[1], pair[0], **measured),
        counts,
        tried,
        st.fixed_dictionaries(fields),
    )


@given(
    values=hnp.arrays(np.float32, 14, elements=st.floats(-8, 8, width=32)),
    weight=st.integers(1, 2**64 - 1),
    said=metrics(),
)
def test_round_trip(signed: SignedPlan, layout: Layout, values: np.ndarray, weight: int, said: LocalMetrics) -> None:
    data = encode_update(Update(values, weight, said), signed_plan=signed, layout=layout)
    decoded = decode_update(data, signed_plan=signed, layout=layout)
    assert decoded.values.tobytes() == values.tobytes()
    assert (decoded.weight, decoded.metrics) == (weight, said)


def test_any_memory_order_is_sent_in_c_order(signed: SignedPlan, layout: Layout) -> None:
    strided = np.arange(28, dtype=np.float64)[::2] / 8
    data = encode_update(Update(strided, 1), signed_plan=signed, layout=layout)  # type: ignore[arg-type]  # a caller's slip
    np.testing.assert_array_equal(decode_update(data, signed_plan=signed, layout=layout).values, strided)
