"""Updates that say some of their values: positions, the bytes of a frame, and every way to be wrong."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import (
    Layout,
    Plan,
    PlanFormatError,
    Quantisation,
    SignedPlan,
    Update,
    UpdateFormatError,
    UpdateValueError,
    decode_update,
    encode_update,
    layout_of,
    open_plan,
    sign_plan,
)
from edge_runtime.wire.plan import _CONTEXT
from edge_runtime.wire.positions import pack_positions, positions_bytes, unpack_positions
from tests.edge.wire.test_wire_quantised import FEATURES, HEAD, RANGES

VALUES = [1, 0, 0, -7, 0, 0, 0, 0, -0.25, 0, 0, 0, 0, -0.0006, 0]  # four of 15, a block each
PLAN_END = b'"min_examples":1,"tier":0,"quantisation":{"bits":4,"ranges":[7.0,0.875,1.75,0.0007],"density":0.25}}'
PAYLOAD = bytes.fromhex(
    "0921"  # bitmap of 15: 0, 3, 8 and 13
    "91ae"  # 1 and -7, -2 and -6
)


@st.composite
def flag_arrays(draw: st.DrawFn) -> np.ndarray:
    flags = np.zeros(draw(st.integers(1, 300)), np.bool_)
    flags[draw(st.lists(st.integers(0, flags.size - 1)))] = True
    return flags


@given(flag_arrays())
def test_positions_come_back(flags: np.ndarray) -> None:
    """In the length that both numbers say, no longer than a bitmap."""
    count = int(flags.sum())
    data = pack_positions(flags)
    assert len(data) == positions_bytes(count, flags.size) <= -(-flags.size // 8)
    np.testing.assert_array_equal(unpack_positions(data, count, flags.size), flags)


@given(st.binary(max_size=12), st.integers(0, 40), st.integers(1, 80))
def test_every_set_has_one_encoding(data: bytes, count: int, of: int) -> None:
    """Whatever bytes are read as positions are written as the same bytes."""
    try:
        flags = unpack_positions(data, min(count, of), of)
    except ValueError:
        return
    assert pack_positions(flags) == data


@pytest.mark.parametrize("share", [0.25, 0.2, 0.1, 0.05, 0.01])
def test_positions_are_short(share: float) -> None:
    """Within 0.8 bits a position of what any code of sets of this size needs."""
    of = 165_888
    count = math.ceil(share * of)
    least = (math.lgamma(of + 1) - math.lgamma(count + 1) - math.lgamma(of - count + 1)) / math.log(2)
    assert 8 * positions_bytes(count, of) <= least + 0.8 * count


def test_positions_of_a_long_array_as_bytes() -> None:
    """Elias-Fano of 3, 5, 6 and 39 of 40: three low bits each, then 0, 0, 0 and 4 in unary."""
    flags = np.zeros(40, np.bool_)
    flags[[3, 5, 6, 39]] = True
    data = pack_positions(flags)
    assert data.hex() == "ab0f" + "87"
    # low bits: 3 = 110, 5 = 101, 6 = 011, 7 = 111, lowest first; bits 0, 1, 2 and 4 + 3 of the unary part
    np.testing.assert_array_equal(unpack_positions(data, 4, 40), flags)


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        ("ab0f", 4, "length: expected 3 bytes for 4 of 40, got 2"),
        ("ab0f07", 4, "expected 4, got 3"),
        ("ab1f87", 4, "left over are not zero"),
        ("5b0f87", 4, "expected rising ones below 40"),  # 3, 3, …
        ("0000000000", 20, "expected 20, got 0"),
    ],
)
def test_wrong_positions_are_named(data: str, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_positions(bytes.fromhex(data), count, 40)


def test_positions_beyond_the_end_are_refused() -> None:
    flags = np.zeros(40, np.bool_)
    flags[[1, 39]] = True
    data = bytearray(pack_positions(flags))
    assert len(data) == positions_bytes(2, 37)
    with pytest.raises(ValueError, match="expected rising ones below 37"):
        unpack_positions(bytes(data), 2, 37)


def sparse(plan: Plan, density: float = 0.25) -> Plan:
    return msgspec.structs.replace(plan, quantisation=Quantisation(4, RANGES, density))


@pytest.fixture(scope="module")
def sparse_plan(plan: Plan, signing_key: Ed25519PrivateKey) -> SignedPlan:
    return sign_plan(sparse(plan), signing_key)


@pytest.fixture(scope="module")
def sparse_layout(sparse_plan: SignedPlan) -> Layout:
    plan = sparse_plan.plan
    return layout_of(plan.modules, FEATURES, HEAD, plan.quantisation or None)


def frame_of(values: list[float], signed: SignedPlan, layout: Layout, update: Update) -> bytes:
    return encode_update(
        Update(np.array(values, np.float32), update.weight, update.metrics), signed_plan=signed, layout=layout
    )


def test_plan_bytes(sparse_plan: SignedPlan, signing_key: Ed25519PrivateKey) -> None:
    assert sparse_plan.data.endswith(PLAN_END)
    assert open_plan(sparse_plan.data, signing_key.public_key()) == sparse_plan


def test_frame_bytes(sparse_plan: SignedPlan, sparse_layout: Layout, update: Update) -> None:
    """Version 3; the payload is positions and codes, and the length follows from the plan."""
    frame = frame_of(VALUES, sparse_plan, sparse_layout, update)
    assert (sparse_layout.held, sparse_layout.count) == (4, 15)
    assert sparse_layout.frame_bytes == len(frame) == 148 + 4
    assert frame[8:10] == b"\x03\0"
    assert frame[88:92] == PAYLOAD
    decoded = decode_update(frame, signed_plan=sparse_plan, layout=sparse_layout)
    np.testing.assert_array_equal(decoded.values, np.array(VALUES, np.float32))
    assert (decoded.weight, decoded.metrics) == (update.weight, update.metrics)


def test_fewer_values_are_filled_up(sparse_plan: SignedPlan, sparse_layout: Layout, update: Update) -> None:
    """Even none: the length is the plan's."""
    for values in ([0.0] * 15, [0.0] * 14 + [0.0001]):
        frame = frame_of(values, sparse_plan, sparse_layout, update)
        assert len(frame) == sparse_layout.frame_bytes
        decoded = decode_update(frame, signed_plan=sparse_plan, layout=sparse_layout)
        np.testing.assert_array_equal(decoded.values, np.array(values, np.float32))


def test_more_values_than_the_plan_wants_are_not_encoded(
    sparse_plan: SignedPlan, sparse_layout: Layout, update: Update
) -> None:
    with pytest.raises(UpdateValueError, match="expected at most 4 values that are not 0, got 5"):
        frame_of([1, 1, *VALUES[2:]], sparse_plan, sparse_layout, update)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("0921918e", "codes: expected at least -7, got -8"),
        ("090191ae", "positions: expected 4, got 3"),
        ("09a191ae", "left over are not zero"),
    ],
)
def test_hostile_payloads_are_refused(
    sparse_plan: SignedPlan, sparse_layout: Layout, update: Update, payload: str, message: str
) -> None:
    frame = bytearray(frame_of(VALUES, sparse_plan, sparse_layout, update))
    frame[88:92] = bytes.fromhex(payload)
    with pytest.raises(UpdateValueError, match=message):
        decode_update(bytes(frame), signed_plan=sparse_plan, layout=sparse_layout)


def test_the_version_is_the_plans(
    sparse_plan: SignedPlan, sparse_layout: Layout, plan: Plan, update: Update, signing_key: Ed25519PrivateKey
) -> None:
    """A frame with all values is no answer to a plan with a density, nor the other way round."""
    whole_plan = sign_plan(msgspec.structs.replace(plan, quantisation=Quantisation(4, RANGES)), signing_key)
    whole_layout = layout_of(plan.modules, FEATURES, HEAD, Quantisation(4, RANGES))
    whole = frame_of(VALUES, whole_plan, whole_layout, update)
    with pytest.raises(UpdateFormatError, match="version 2"):
        decode_update(whole, signed_plan=sparse_plan, layout=sparse_layout)
    some = frame_of(VALUES, sparse_plan, sparse_layout, update)
    with pytest.raises(UpdateFormatError, match="version 3"):
        decode_update(some, signed_plan=whole_plan, layout=whole_layout)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0, 1.5, math.nan])
def test_a_density_is_a_share(plan: Plan, signing_key: Ed25519PrivateKey, density: float) -> None:
    text = msgspec.json.encode(sparse(plan)).replace(b'"density":0.25', b'"density":%s' % str(density).encode())
    with pytest.raises(PlanFormatError):
        open_plan(signing_key.sign(_CONTEXT + text) + text, signing_key.public_key())


@given(st.floats(0.001, 0.999), st.integers(0, 5000))
def test_held_is_a_share_and_never_nothing(density: float, count: int) -> None:
    held = Quantisation(4, (), density).held(count)
    assert held == math.ceil(density * count) <= count
    assert bool(held) == bool(count)
