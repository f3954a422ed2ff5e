"""A patch frame: its bytes, a round trip, and every way to be wrong by its error."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import (
    PatchError,
    PatchFormatError,
    PatchHead,
    PatchPlanError,
    PatchValueError,
    adapter_layout,
    decode_patch,
    encode_patch,
    fewest_bits,
)
from edge_runtime.wire.components import rounded
from edge_runtime.wire.patch import OWN, PatchBits, patch_bytes

DIGEST = "ad" * 32
LAYOUT = adapter_layout(
    {"layer.0.query": 2, "layer.1.query": 1},
    {"layer.0.query": (3, 2), "layer.1.query": (3, 2)},
    {"classifier.bias": (2,)},
)
TENSORS = {
    "layer.0.query.lora_b": np.array([[127, -4], [64, 127]], np.float32) * np.array([0.5, 0.25], np.float32),
    "classifier.bias": np.array([2, -2.25], np.float32),
}
FOUR = {"layer.0.query.lora_b": np.array([[7, -1], [-6, 7]], np.float32) * np.array([0.5, 0.25], np.float32)}

HEADER = (
    "454d424552504154"  # 0: "EMBERPAT"
    "0100"  # 8: version 1
    "{bits}"  # 10: bits
    "07000000"  # 12: to round 7
    "{since}"  # 16: from round
    "adadadadadadadadadadadadadadadadadadadadadadadadadadadadadadadad"  # 24: digest of what it makes
)
FLOAT32 = bytes.fromhex(
    HEADER.format(bits="2000", since="ffffffffffffffff")
    + "12"  # 56: the second and the fifth of five tensors
    + "00007e42000080bf000000420000fe41"  # layer.0.query.lora_b (2, 2): 63.5, -1, 32, 31.75
    + "00000040000010c0"  # classifier.bias (2,): 2, -2.25
)
INT8 = bytes.fromhex(
    HEADER.format(bits="0800", since="0400000000000000")
    + "12"
    + "0000003f0000803e"  # layer.0.query.lora_b: scales of its columns, 0.5 and 0.25
    + "7ffc407f"  # codes 127, -4, 64, 127
    + "00000040000010c0"  # classifier.bias: no matrix, float32
)
INT4 = bytes.fromhex(
    HEADER.format(bits="0400", since="0400000000000000")
    + "02"
    + "0000003f0000803e"  # scales of the columns, 0.5 and 0.25
    + "f77a"  # 7 and -1 (0xf); -6 (0xa) and 7
)


def read(data: bytes, *, since: int = 4, round_: int = 7, digest: str = DIGEST) -> dict[str, np.ndarray]:
    return decode_patch(data, since=since, round_=round_, digest=digest, layout=LAYOUT)


def test_order_is_that_of_the_adapter() -> None:
    assert [name for name, _ in LAYOUT.blocks] == [
        "layer.0.query.lora_a",
        "layer.0.query.lora_b",
        "layer.1.query.lora_a",
        "layer.1.query.lora_b",
        "classifier.bias",
    ]


@pytest.mark.parametrize(
    ("frame", "since", "bits", "tensors"), [(FLOAT32, OWN, 32, TENSORS), (INT8, 4, 8, TENSORS), (INT4, 4, 4, FOUR)]
)
def test_golden_bytes(frame: bytes, since: int, bits: PatchBits, tensors: dict[str, np.ndarray]) -> None:
    assert encode_patch(PatchHead(since, 7, DIGEST, bits), tensors, LAYOUT) == frame
    found = read(frame, since=since)
    assert list(found) == list(tensors)
    for name, values in tensors.items():
        assert (found[name].dtype, found[name].tobytes()) == (np.float32, values.tobytes())


def test_a_head_beside_factors_of_4_bits_has_8() -> None:
    """Byte for byte: two scales, then a byte a value of the head; half a byte a value of the factor."""
    head = np.array([[127, -4], [64, 127]], np.float32) * np.array([[0.5], [0.25]], np.float32)
    tensors = {**FOUR, "classifier.weight": head}
    layout = adapter_layout({"layer.0.query": 2}, {"layer.0.query": (3, 2)}, {"classifier.weight": (2, 2)})
    assert fewest_bits(tensors, 4) == 4
    frame = encode_patch(PatchHead(2, 7, DIGEST, 4), tensors, layout)
    assert frame[-12:].hex() == "0000003f" + "0000803e" + "7ffc407f"
    assert len(frame) == 56 + 1 + (8 + 2) + (8 + 4) == patch_bytes(set(tensors), layout, 4)
    found = decode_patch(frame, since=2, round_=7, digest=DIGEST, layout=layout)
    assert found["classifier.weight"].tobytes() == head.tobytes()


def test_bits_are_used_only_where_they_give_the_very_tensors() -> None:
    assert fewest_bits(TENSORS, 8) == 8
    assert fewest_bits(FOUR, 4) == 4
    assert fewest_bits(TENSORS, 4) == 32
    assert fewest_bits(TENSORS | {"layer.1.query.lora_a": np.array([[1, 0.3, 0.7]], np.float32)}, 8) == 32
    assert fewest_bits({"classifier.bias": np.array([0.1, 0.7], np.float32)}, 4) == 4
    assert fewest_bits({}, 8) == 8


@given(st.sets(st.sampled_from([name for name, _ in LAYOUT.blocks])), st.sampled_from([32, 8, 4]), st.integers(0, 99))
def test_what_is_patched_is_what_was_published(names: set[str], bits: PatchBits, seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in LAYOUT.blocks if name in names}
    tensors = drawn if bits == 32 else {name: rounded(name, values, bits) for name, values in drawn.items()}
    assert fewest_bits(tensors, bits) == bits
    found = read(encode_patch(PatchHead(4, 7, DIGEST, bits), tensors, LAYOUT))
    assert {name: values.tobytes() for name, values in found.items()} == {
        name: values.tobytes() for name, values in tensors.items()
    }


def put(frame: bytes, offset: int, data: str) -> bytes:
    raw = bytes.fromhex(data)
    return frame[:offset] + raw + frame[offset + len(raw) :]


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (b"EMBERPAT", PatchFormatError, "length: expected at least 56 bytes, got 8"),
        (put(INT8, 7, "50"), PatchFormatError, "got b'EMBERPAP' version 1 of 8"),
        (put(INT8, 8, "02"), PatchFormatError, "got b'EMBERPAT' version 2 of 8"),
        (put(INT8, 10, "10"), PatchFormatError, "of 32, 8 or 4 bits, got .* of 16"),
        (put(INT8, 12, "08"), PatchPlanError, "one from round 4 to 7 .* got 4 to 8"),
        (put(INT8, 16, "ff" * 8), PatchPlanError, "one from round 4 to 7 .* got -1 to 7"),
        (put(INT8, 24, "00"), PatchPlanError, "makes adadadadadad, got 4 to 7 that makes 00adadadadad"),
        (INT8[:56], PatchFormatError, "marks: expected 5 bits and nothing beyond, got $"),
        (put(INT8, 56, "32"), PatchFormatError, "marks: expected 5 bits and nothing beyond, got 32"),
        (put(INT8, 56, "10"), PatchFormatError, "length: expected 65 bytes, got 77"),
        (put(INT8, 10, "04"), PatchFormatError, "length: expected 75 bytes, got 77"),
        (INT8[:-1], PatchFormatError, "length: expected 77 bytes, got 76"),
        (INT8 + b"\0", PatchFormatError, "length: expected 77 bytes, got 78"),
        (put(INT8, 57, "0000c07f"), PatchValueError, "layer.0.query.lora_b: scales: expected finite"),
        (put(INT8, 57, "0000807f"), PatchValueError, "layer.0.query.lora_b: scales: expected finite"),
        (put(INT8, 57, "000000bf"), PatchValueError, "layer.0.query.lora_b: scales: .* at least 2"),
        (put(INT8, 57, "ffff7f00"), PatchValueError, "layer.0.query.lora_b: scales: .* at least 2"),
        (put(INT8, 57, "ffff7f7f"), PatchValueError, "layer.0.query.lora_b: holds NaN or infinity"),
        (put(INT8, 65, "80"), PatchValueError, "layer.0.query.lora_b: codes: expected at least -127, got -128"),
        (put(INT4, 65, "f8"), PatchValueError, "layer.0.query.lora_b: codes: expected at least -7, got -8"),
        (put(INT8, 69, "0000807f"), PatchValueError, "classifier.bias: holds NaN or infinity"),
    ],
)
def test_hostile_bytes(frame: bytes, error: type[PatchError], message: str) -> None:
    with pytest.raises(error, match=message):
        read(frame)


@given(st.data())
def test_only_named_errors_come_out(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([FLOAT32, INT8, INT4]))
    start, length = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 20))
    mutated = whole[:start] + data.draw(st.binary(max_size=40)) + whole[start + length :]
    with contextlib.suppress(PatchError):
        found = read(mutated, since=data.draw(st.sampled_from([OWN, 4])))
        assert all(np.isfinite(values).all() for values in found.values())
