"""Quantised updates on the wire: the bytes of plan and frame, and every way to be wrong."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct

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
    UpdateError,
    UpdateFormatError,
    UpdateLayoutError,
    UpdatePlanError,
    UpdateValueError,
    decode_update,
    encode_update,
    layout_of,
    open_plan,
    sign_plan,
)
from edge_runtime.wire.codes import Bits, largest_code, packed_bytes

FEATURES = {"layer.0.query": (3, 2), "layer.1.query": (3, 2)}
HEAD = {"classifier.bias": (3,)}
SIZES = (6, 4, 2, 3)
RANGES = (7.0, 0.875, 1.75, 0.0007)  # of four bits a code is 1, 1/8, 1/4 and 0.0001
VALUES = [1, -1, 7, -7, 0, 3, 0.25, 0, -0.25, 0.625, -0.75, 1, 0.0006, -0.0006, 0.0001]

PLAN_END = b'"min_examples":1,"tier":0,"quantisation":{"bits":4,"ranges":[7.0,0.875,1.75,0.0007]}}'
PLAN_DIGEST = "d3a891f6c912dfff2206522fccf49aaa363af8d419297292a1f9fe1d1ffd0f86"
LAYOUT_TEXT = b"layer.0.query.lora_a 2x3\nlayer.0.query.lora_b 2x2\nlayer.1.query.lora_b 2x1\nclassifier.bias 3\n"
FRAME = bytes.fromhex(
    "454d424552555044"  # 0: "EMBERUPD"
    "0200"  # 8: version 2
    "0000"  # 10: reserved
    "07000000"  # 12: round 7
    "d3a891f6c912dfff2206522fccf49aaa363af8d419297292a1f9fe1d1ffd0f86"  # 16: plan digest
    "85ae50870664dcf8a0b28fa9f717ae734803959fec4cf325e09a064c5e9a82cf"  # 48: layout digest
    "0f00000000000000"  # 80: 15 values
    "f19730"  # 88: layer.0.query.lora_a (2, 3): 1 and -1, 7 and -7, 0 and 3
    "025e"  # layer.0.query.lora_b (2, 2): 2 and 0, -2 and 5
    "4d"  # layer.1.query.lora_b (2, 1): -3 and 4
    "a601"  # classifier.bias (3,): 6 and -6, 1 and the half that is left over
    "2c01000000000000"  # 88 + 8: weight 300
    "26000000"  # 38 steps
    "64000000"  # 100 examples
    "3d000000"  # 61 correct
    "000000000000e63f"  # loss at start 0.6875
    "000000000000e03f"  # loss at end 0.5
    "000000000000e43f"  # evaluation loss 0.625
    "0000000000002940"  # 12.5 seconds
    "0000c07f"  # peak private memory: NaN, not measured
    "00002044"  # peak total memory 640 MB
)
PAYLOAD, TRAILER = 88, 96


def quantised(plan: Plan, bits: Bits = 4, ranges: tuple[float, ...] = RANGES) -> Plan:
    return msgspec.structs.replace(plan, quantisation=Quantisation(bits, ranges))


@pytest.fixture(scope="module")
def codes_plan(plan: Plan, signing_key: Ed25519PrivateKey) -> SignedPlan:
    return sign_plan(quantised(plan), signing_key)


@pytest.fixture(scope="module")
def codes_layout(codes_plan: SignedPlan) -> Layout:
    plan = codes_plan.plan
    return layout_of(plan.modules, FEATURES, HEAD, plan.quantisation or None)


@pytest.fixture(scope="module")
def codes_update(update: Update) -> Update:
    return Update(np.array(VALUES, np.float32), update.weight, update.metrics)


def test_plan_bytes(codes_plan: SignedPlan, signing_key: Ed25519PrivateKey) -> None:
    assert codes_plan.data.endswith(PLAN_END)
    assert codes_plan.digest == PLAN_DIGEST
    assert open_plan(codes_plan.data, signing_key.public_key()) == codes_plan


def test_frame_bytes(codes_plan: SignedPlan, codes_layout: Layout, codes_update: Update) -> None:
    assert hashlib.sha256(LAYOUT_TEXT).digest() == codes_layout.digest()
    assert codes_layout.frame_bytes == len(FRAME) == 148 + 8
    assert encode_update(codes_update, signed_plan=codes_plan, layout=codes_layout) == FRAME
    decoded = decode_update(FRAME, signed_plan=codes_plan, layout=codes_layout)
    assert (decoded.weight, decoded.metrics) == (300, codes_update.metrics)
    assert decoded.values.dtype == np.float32
    np.testing.assert_array_equal(decoded.values, codes_update.values)


@pytest.mark.parametrize(
    ("offset", "put", "error", "message"),
    [
        (0, b"EMBERUPE", UpdateFormatError, "got b'EMBERUPE' version 2"),
        (8, b"\x01", UpdateFormatError, "expected b'EMBERUPD' version 2, got b'EMBERUPD' version 1"),
        (8, b"\x03", UpdateFormatError, "version 3"),
        (12, b"\x08", UpdatePlanError, "expected round 7 .*, got 8"),
        (16, b"\xff", UpdatePlanError, "of plan"),
        (48, b"\xff", UpdateLayoutError, "of layout"),
        (80, b"\x0e", UpdateLayoutError, "expected 15 values .*, got 14"),
        (PAYLOAD, b"\x81", UpdateValueError, "block 0: codes: expected at least -7, got -8"),
        (PAYLOAD, b"\x18", UpdateValueError, "block 0: codes: expected at least -7, got -8"),
        (PAYLOAD + 7, b"\x11", UpdateValueError, "block 3: codes: the half byte that is left over is not zero"),
        (TRAILER, bytes(8), UpdateValueError, "weight: expected at least 1, got 0"),
        (TRAILER + 16, b"\x65", UpdateValueError, "expected at most 100 correct examples, got 101"),
    ],
)
def test_wrong_field_is_named(
    codes_plan: SignedPlan, codes_layout: Layout, offset: int, put: bytes, error: type[UpdateError], message: str
) -> None:
    hostile = FRAME[:offset] + put + FRAME[offset + len(put) :]
    with pytest.raises(error, match=message) as caught:
        decode_update(hostile, signed_plan=codes_plan, layout=codes_layout)
    assert type(caught.value) is error


def test_length_is_exact(codes_plan: SignedPlan, codes_layout: Layout) -> None:
    for wrong in (b"", FRAME[:-1], FRAME[:148], FRAME + b"\0", FRAME + bytes(4 * 15 - 8)):
        with pytest.raises(UpdateFormatError, match=f"expected {len(FRAME)} bytes, got {len(wrong)}"):
            decode_update(wrong, signed_plan=codes_plan, layout=codes_layout)


def test_a_float_frame_is_no_answer_to_a_plan_that_quantises(
    codes_plan: SignedPlan, codes_layout: Layout, codes_update: Update
) -> None:
    plain = encode_update(codes_update, signed_plan=codes_plan, layout=Layout(codes_layout.blocks))
    with pytest.raises(UpdateFormatError, match=r"version 1"):
        decode_update(plain, signed_plan=codes_plan, layout=codes_layout)


@pytest.mark.parametrize("wrong", [7.001, 8.0, -8.0, 0.5, np.nan, np.inf, 1e38])
def test_what_no_code_says_is_not_encoded(
    codes_plan: SignedPlan, codes_layout: Layout, codes_update: Update, wrong: float
) -> None:
    """The device rounds; the format does not, so that nothing is rounded twice or silently."""
    values = codes_update.values.copy()
    values[2] = wrong
    with pytest.raises(UpdateValueError, match="block 0: a value is no multiple of 1, or beyond 7 of them"):
        encode_update(Update(values, 1), signed_plan=codes_plan, layout=codes_layout)


def test_a_code_beyond_the_bound_of_the_sum_is_refused(plan: Plan, signing_key: Ed25519PrivateKey) -> None:
    """Also where a plan was made without being checked."""
    signed = sign_plan(quantised(plan, ranges=(9.0, *RANGES[1:])), signing_key)
    layout = layout_of(plan.modules, FEATURES, HEAD, signed.plan.quantisation or None)
    update = Update(np.array([9.0] + [0.0] * 14, np.float32), 1)
    with pytest.raises(UpdateValueError, match="within ±8"):
        decode_update(encode_update(update, signed_plan=signed, layout=layout), signed_plan=signed, layout=layout)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"bits": 4, "ranges": [0.0]}, "ranges must be more than 0 and at most max_abs"),
        ({"bits": 4, "ranges": [1.0, -1.0]}, "ranges must be more than 0 and at most max_abs"),
        ({"bits": 4, "ranges": [8.001]}, "ranges must be more than 0 and at most max_abs"),
        ({"bits": 5, "ranges": [1.0]}, "not a plan of schema 1"),
        ({"bits": 8, "ranges": ["1"]}, "not a plan of schema 1"),
        ({"bits": 8, "ranges": 1.0}, "not a plan of schema 1"),
        ({"bits": 8}, "not a plan of schema 1"),
        ({"bits": 8, "ranges": [], "scale": 1}, "not a plan of schema 1"),
        (None, "not a plan of schema 1"),
    ],
)
def test_wrong_quantisation_is_named(
    signed: SignedPlan, signing_key: Ed25519PrivateKey, value: object, message: str
) -> None:
    text = json.dumps(json.loads(signed.data[64:]) | {"quantisation": value}).encode()
    with pytest.raises(PlanFormatError, match=message):
        open_plan(signing_key.sign(b"emberlora plan 1\0" + text) + text, signing_key.public_key())


@pytest.mark.parametrize("text", [b"1e999", b"NaN", b"-Infinity"])
def test_a_range_is_finite(signed: SignedPlan, signing_key: Ed25519PrivateKey, text: bytes) -> None:
    hostile = signed.data[64:-1] + b',"quantisation":{"bits":4,"ranges":[' + text + b"]}}"
    with pytest.raises(PlanFormatError):
        open_plan(signing_key.sign(b"emberlora plan 1\0" + hostile) + hostile, signing_key.public_key())


def test_every_block_has_a_range(plan: Plan) -> None:
    for count in (0, 3, 5):
        with pytest.raises(PlanFormatError, match=f"quantisation: expected 4 ranges, one a block, got {count}"):
            layout_of(plan.modules, FEATURES, HEAD, Quantisation(8, (1.0,) * count))


@given(bits=st.sampled_from([2, 4, 8]), data=st.data())
def test_round_trip(plan: Plan, signing_key: Ed25519PrivateKey, bits: Bits, data: st.DataObject) -> None:
    """Every code of every range comes back as the same float32 value, whatever the range."""
    most = largest_code(bits)
    ranges = tuple(data.draw(st.lists(st.floats(1e-9, 7.9), min_size=4, max_size=4)))
    codes = [data.draw(st.lists(st.integers(-most, most), min_size=size, max_size=size)) for size in SIZES]
    values = np.concatenate([np.array(part) * (range_ / most) for part, range_ in zip(codes, ranges, strict=True)])
    signed = sign_plan(quantised(plan, bits, ranges), signing_key)
    layout = layout_of(plan.modules, FEATURES, HEAD, signed.plan.quantisation or None)
    frame = encode_update(Update(values.astype(np.float32), 1), signed_plan=signed, layout=layout)
    assert len(frame) == layout.frame_bytes == 148 + sum(packed_bytes(size, bits) for size in SIZES)
    decoded = decode_update(frame, signed_plan=signed, layout=layout)
    np.testing.assert_array_equal(decoded.values, values.astype(np.float32))
    if bits == 8:
        assert list(struct.unpack_from("<15b", frame, 88)) == [code for part in codes for code in part]


@given(data=st.data())
def test_fuzz(codes_plan: SignedPlan, codes_layout: Layout, data: st.DataObject) -> None:
    start, length = data.draw(st.integers(0, len(FRAME))), data.draw(st.integers(0, 20))
    frame = FRAME[:start] + data.draw(st.binary(max_size=40)) + FRAME[start + length :]
    with contextlib.suppress(UpdateError):
        decode_update(frame, signed_plan=codes_plan, layout=codes_layout)
