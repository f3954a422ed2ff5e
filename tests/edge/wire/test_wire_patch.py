"""A patch frame: its bytes, a round trip, and every way to be wrong by its error."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Mapping

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
from edge_runtime.wire.codes import Bits
from edge_runtime.wire.components import rounded
from edge_runtime.wire.patch import Change, change_of
from edge_runtime.wire.patch_frame import OWN, PatchBits, component_counts, parse_patch, patch_bytes

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
ONE = {"layer.0.query.lora_b": Change((1,), np.array([[-1], [7]], np.float32) * np.float32(0.25))}
FOUR = {"layer.0.query.lora_b": np.array([[7, -1], [-6, 7]], np.float32) * np.array([0.5, 0.25], np.float32)}


def whole(tensors: dict[str, np.ndarray]) -> dict[str, Change]:
    """Changes of every component."""
    return {name: change_of(name, values, range(values.shape[-1])) for name, values in tensors.items()}


HEADER = (
    "454d424552504154"  # 0: "EMBERPAT"
    "0200"  # 8: version 2
    "{bits}"  # 10: bits
    "07000000"  # 12: to round 7
    "{since}"  # 16: from round
    "adadadadadadadadadadadadadadadadadadadadadadadadadadadadadadadad"  # 24: digest of what it makes
)
FLOAT32 = bytes.fromhex(
    HEADER.format(bits="2000", since="ffffffffffffffff")
    + "4c"  # 56: the third, fourth and seventh of 2 + 2 + 1 + 1 + 1 components
    + "00007e42000080bf000000420000fe41"  # layer.0.query.lora_b (2, 2): 63.5, -1, 32, 31.75
    + "00000040000010c0"  # classifier.bias (2,): 2, -2.25
)
INT8 = bytes.fromhex(
    HEADER.format(bits="0800", since="0400000000000000")
    + "4c"
    + "0000003f0000803e"  # layer.0.query.lora_b: scales of its columns, 0.5 and 0.25
    + "7ffc407f"  # codes 127, -4, 64, 127
    + "00000040000010c0"  # classifier.bias: no matrix, float32
)
INT4 = bytes.fromhex(
    HEADER.format(bits="0400", since="0400000000000000")
    + "0c"
    + "0000003f0000803e"  # scales of the columns, 0.5 and 0.25
    + "f77a"  # 7 and -1 (0xf); -6 (0xa) and 7
)
COLUMN = bytes.fromhex(
    HEADER.format(bits="0400", since="0400000000000000")
    + "08"  # the second column of layer.0.query.lora_b alone
    + "0000803e"  # its scale, 0.25
    + "7f"  # -1 (0xf) and 7
)


STORED = "01" + "0200" + "fdff"  # deflate (RFC 1951): the last block, stored as it is, its length and that inverted
DEFLATED_FRAME = bytes.fromhex(
    HEADER.format(bits="0401", since="0400000000000000").replace("0200", "0300")  # version 3, of 4 bits, coding 1
    + "0c"
    + "7e7d"  # exponents of the scales of the columns: 0.5 is 2 ** (126 - 127), 0.25 is 2 ** (125 - 127)
    + STORED
    + "f77a"  # as in INT4
)
DIFFERENCES_FRAME = bytes.fromhex(
    HEADER.format(bits="0402", since="0400000000000000").replace("0200", "0300")  # coding 2
    + "0c"
    + "7e7d"
    + STORED
    + "e101"  # 1 and -2 (0xe); 1 and 0: FOUR's codes 7, -1, -6, 7 less those of OLDER
)
# On the scales of FOUR its codes are 6 and 1; -7 (-9 is none) and 7.
OLDER = {"layer.0.query.lora_b": np.array([[3.1, 0.26], [-4.5, 1.8]], np.float32)}


def read(
    data: bytes, *, since: int = 4, round_: int = 7, older: Mapping[str, np.ndarray] | None = None
) -> dict[str, Change]:
    return decode_patch(data, since=since, round_=round_, digest=DIGEST, layout=LAYOUT, older=older or {})


def test_order_is_that_of_the_adapter() -> None:
    assert [name for name, _ in LAYOUT.blocks] == [
        "layer.0.query.lora_a",
        "layer.0.query.lora_b",
        "layer.1.query.lora_a",
        "layer.1.query.lora_b",
        "classifier.bias",
    ]


@pytest.mark.parametrize(
    ("frame", "since", "bits", "changes"),
    [
        (FLOAT32, OWN, 32, whole(TENSORS)),
        (INT8, 4, 8, whole(TENSORS)),
        (INT4, 4, 4, whole(FOUR)),
        (COLUMN, 4, 4, ONE),
    ],
)
def test_golden_bytes(frame: bytes, since: int, bits: PatchBits, changes: dict[str, Change]) -> None:
    assert encode_patch(PatchHead(since, 7, DIGEST, bits), changes, LAYOUT) == frame
    assert len(frame) == patch_bytes({name: len(c.numbers) for name, c in changes.items()}, LAYOUT, bits)
    found = read(frame, since=since)
    assert list(found) == list(changes)
    for name, change in changes.items():
        assert found[name].numbers == change.numbers
        assert (found[name].values.dtype, found[name].values.tobytes()) == (np.float32, change.values.tobytes())


@pytest.mark.parametrize(
    ("frame", "older"), [(DEFLATED_FRAME, {}), (DEFLATED_FRAME, OLDER), (DIFFERENCES_FRAME, OLDER)]
)
def test_golden_bytes_of_deflated_codes(frame: bytes, older: dict[str, np.ndarray]) -> None:
    """Streams of one content may differ, so what is written is compared by what is read."""
    found = read(frame, older=older)
    assert found["layer.0.query.lora_b"].values.tobytes() == FOUR["layer.0.query.lora_b"].tobytes()


def test_differences_go_round_the_circle_of_codes() -> None:
    """From -7 to 7 it is a step down; and an older tensor of another shape, or none, predicts zeros."""
    newer = {"layer.0.query.lora_b": np.array([[7, 7], [7, -7]], np.float32)}
    older = {"layer.0.query.lora_b": np.array([[-7, 7], [6, 7]], np.float32)}
    frame = bytes.fromhex(DIFFERENCES_FRAME.hex()[:-18] + "7f7f" + STORED + "0f" + "11")
    assert read(frame, older=older)["layer.0.query.lora_b"].values.tolist() == newer["layer.0.query.lora_b"].tolist()
    for nothing in ({}, {"layer.0.query.lora_b": np.ones((2, 3), np.float32)}):
        assert read(frame, older=nothing)["layer.0.query.lora_b"].values.tolist() == [[-1, 0], [1, 1]]


@given(st.data(), st.sampled_from([8, 4]), st.integers(0, 99), st.sampled_from([0.0, 0.01, 1.0]))
def test_the_shortest_coding_says_the_same(data: st.DataObject, bits: Bits, seed: int, moved: float) -> None:
    """Whatever was drawn for the change, and whatever is older; never longer than plain, and told by who reads it."""
    rng = np.random.default_rng(seed)
    layout = adapter_layout({"m": 4}, {"m": (64, 48)}, {"classifier.weight": (5, 48), "classifier.bias": (5,)})
    older = {name: rng.normal(size=shape).astype(np.float32) for name, shape in layout.blocks}
    shift = {name: rng.normal(size=shape).astype(np.float32) for name, shape in layout.blocks}
    newer = {name: rounded(name, older[name] + np.float32(moved) * shift[name], bits) for name in older}
    counts = component_counts(layout)
    names = data.draw(st.sets(st.sampled_from(sorted(counts)), min_size=1))
    changes = {name: change_of(name, newer[name], range(counts[name])) for name in names}
    head = PatchHead(4, 7, DIGEST, bits)
    if data.draw(st.booleans()):
        older.pop("m.lora_a")
    frames = [
        encode_patch(head, changes, layout),
        encode_patch(head, changes, layout, deflated=True),
        encode_patch(head, changes, layout, older=older, deflated=True),
    ]
    assert len(frames[0]) == patch_bytes({name: counts[name] for name in names}, layout, bits)
    assert len(frames[0]) >= len(frames[1]) >= len(frames[2])
    for frame in frames:
        found = decode_patch(frame, since=4, round_=7, digest=DIGEST, layout=layout, older=older)
        assert {name: change.values.tobytes() for name, change in found.items()} == {
            name: newer[name].tobytes() for name in names
        }
        parsed = parse_patch(frame, since=4, round_=7, digest=DIGEST, layout=layout)
        assert parsed.encode() == frame
        assert list(parsed.only(["m.lora_a"]).parts) == (["m.lora_a"] if "m.lora_a" in names else [])


def test_what_has_hardly_moved_costs_hardly_anything() -> None:
    """Codes that stay are zeros: less than a bit a value, where plain has four."""
    rng = np.random.default_rng(0)
    layout = adapter_layout({"m": 8}, {"m": (384, 384)}, {})
    older = {name: rounded(name, rng.normal(size=shape).astype(np.float32), 4) for name, shape in layout.blocks}
    shifts = {name: rng.normal(size=array.shape).astype(np.float32) for name, array in older.items()}
    newer = {name: rounded(name, array + np.float32(0.05) * shifts[name], 4) for name, array in older.items()}
    changes = {name: change_of(name, array, range(8)) for name, array in newer.items()}
    values = sum(array.size for array in newer.values())
    patch = encode_patch(PatchHead(4, 7, DIGEST, 4), changes, layout, older=older, deflated=True)
    assert 8 * len(patch) / values < 1.2
    whole = encode_patch(PatchHead(4, 7, DIGEST, 4), changes, layout, deflated=True)
    assert 2.5 < 8 * len(whole) / values < 3.3


@pytest.mark.parametrize("name", ["m.lora_a", "m.lora_b", "classifier.weight"])
def test_a_change_puts_its_components_over_the_older_tensor(name: str) -> None:
    """Rows of A and of a head, columns of B; the older tensor stays as it was."""
    older, newer = np.arange(12, dtype=np.float32).reshape(3, 4), -np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = older.copy()
    for number in (0, 2):
        if name == "m.lora_b":
            expected[:, number] = newer[:, number]
        else:
            expected[number] = newer[number]
    change = change_of(name, newer, [0, 2])
    assert np.array_equal(change.applied(name, older, (3, 4)), expected)
    assert older[0, 1] == 1
    with pytest.raises(PatchFormatError, match=r"some components of \(3, 4\), but the older adapter has \(3, 5\)"):
        change.applied(name, np.zeros((3, 5), np.float32), (3, 4))
    with pytest.raises(PatchFormatError, match="but the older adapter has none"):
        change.applied(name, None, (3, 4))


def test_a_change_of_everything_needs_no_older_tensor() -> None:
    values = np.ones((3, 4), np.float32)
    assert change_of("m.lora_b", values, range(4)).applied("m.lora_b", None, (3, 4)) is not None
    assert change_of("bias", values[0], ()).applied("bias", np.zeros(9, np.float32), (4,)).tolist() == [1, 1, 1, 1]


def test_a_head_beside_factors_of_4_bits_has_8() -> None:
    """Byte for byte: two scales, then a byte a value of the head; half a byte a value of the factor."""
    head = np.array([[127, -4], [64, 127]], np.float32) * np.array([[0.5], [0.25]], np.float32)
    tensors = {**FOUR, "classifier.weight": head}
    layout = adapter_layout({"layer.0.query": 2}, {"layer.0.query": (3, 2)}, {"classifier.weight": (2, 2)})
    changes = whole(tensors)
    assert fewest_bits(changes, 4) == 4
    frame = encode_patch(PatchHead(2, 7, DIGEST, 4), changes, layout)
    assert frame[-12:].hex() == "0000003f" + "0000803e" + "7ffc407f"
    assert len(frame) == 56 + 1 + (8 + 2) + (8 + 4) == patch_bytes(dict.fromkeys(tensors, 2), layout, 4)
    found = decode_patch(frame, since=2, round_=7, digest=DIGEST, layout=layout, older={})
    assert found["classifier.weight"].values.tobytes() == head.tobytes()


def test_bits_are_used_only_where_they_give_the_very_tensors() -> None:
    assert fewest_bits(whole(TENSORS), 8) == 8
    assert fewest_bits(whole(FOUR), 4) == 4
    assert fewest_bits(whole(TENSORS), 4) == 32
    odd = {"layer.1.query.lora_a": Change((0,), np.array([[1, 0.3, 0.7]], np.float32))}
    assert fewest_bits(whole(TENSORS) | odd, 8) == 32
    assert fewest_bits({"classifier.bias": Change((0,), np.array([0.1, 0.7], np.float32))}, 4) == 4
    assert fewest_bits({}, 8) == 8


@given(st.data(), st.sampled_from([32, 8, 4]), st.integers(0, 99))
def test_what_is_patched_is_what_was_published(data: st.DataObject, bits: PatchBits, seed: int) -> None:
    """Any components of any tensors, over an older adapter."""
    rng, shapes = np.random.default_rng(seed), dict(LAYOUT.blocks)
    older, newer = ({n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()} for _ in range(2))
    newer = newer if bits == 32 else {name: rounded(name, values, bits) for name, values in newer.items()}
    every = [(name, number) for name, count in component_counts(LAYOUT).items() for number in range(count)]
    chosen = data.draw(st.sets(st.sampled_from(every)))
    numbers = {name: sorted(number for owner, number in chosen if owner == name) for name in shapes}
    changes = {name: change_of(name, newer[name], found) for name, found in numbers.items() if found}
    assert fewest_bits(changes, bits) == bits
    frame = encode_patch(PatchHead(4, 7, DIGEST, bits), changes, LAYOUT)
    assert len(frame) == patch_bytes({name: len(change.numbers) for name, change in changes.items()}, LAYOUT, bits)
    found = read(frame)
    assert {(name, number) for name, change in found.items() for number in change.numbers} == chosen
    for name, shape in shapes.items():
        made = found[name].applied(name, older[name], shape) if name in found else older[name]
        for number in range(component_counts(LAYOUT)[name]):
            side = slice(None) if len(shape) == 1 else number
            source = newer if (name, number) in chosen else older
            lying = (lambda array: array.T) if name.endswith("lora_b") else (lambda array: array)
            assert lying(made)[side].tobytes() == lying(source[name])[side].tobytes()


def stream_of(data: bytes) -> bytes:
    """A frame with a stream of these bytes in place of its codes."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return DEFLATED_FRAME[:59] + stream.compress(data) + stream.flush()


def put(frame: bytes, offset: int, data: str) -> bytes:
    raw = bytes.fromhex(data)
    return frame[:offset] + raw + frame[offset + len(raw) :]


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (b"EMBERPAT", PatchFormatError, "length: expected at least 56 bytes, got 8"),
        (put(INT8, 7, "50"), PatchFormatError, "got b'EMBERPAP' version 2 of 8"),
        (put(INT8, 8, "01"), PatchFormatError, "got b'EMBERPAT' version 1 of 8"),
        (put(INT8, 10, "10"), PatchFormatError, "of 32, 8 or 4 bits, got .* of 16"),
        (put(INT8, 12, "08"), PatchPlanError, "one from round 4 to 7 .* got 4 to 8"),
        (put(INT8, 16, "ff" * 8), PatchPlanError, "one from round 4 to 7 .* got -1 to 7"),
        (put(INT8, 24, "00"), PatchPlanError, "makes adadadadadad, got 4 to 7 that makes 00adadadadad"),
        (INT8[:56], PatchFormatError, "marks: expected 7 bits and nothing beyond, got $"),
        (put(INT8, 56, "cc"), PatchFormatError, "marks: expected 7 bits and nothing beyond, got cc"),
        (put(INT8, 56, "40"), PatchFormatError, "length: expected 65 bytes, got 77"),
        (put(INT8, 56, "48"), PatchFormatError, "length: expected 71 bytes, got 77"),
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
        (put(INT8, 11, "01"), PatchFormatError, "coding 1: none of version 2 with 8 bits"),
        (put(DEFLATED_FRAME, 11, "00"), PatchFormatError, "coding 0: none of version 3 with 4 bits"),
        (put(DEFLATED_FRAME, 11, "03"), PatchFormatError, "coding 3: none of version 3 with 4 bits"),
        (put(DEFLATED_FRAME, 10, "20"), PatchFormatError, "coding 1: none of version 3 with 32 bits"),
        (put(DEFLATED_FRAME, 57, "00"), PatchValueError, "layer.0.query.lora_b: scales: expected finite and at least"),
        (put(DEFLATED_FRAME, 57, "ff"), PatchValueError, "layer.0.query.lora_b: scales: expected finite and at least"),
        (put(DEFLATED_FRAME, 57, "fe"), PatchValueError, "layer.0.query.lora_b: holds NaN or infinity"),
        (put(DEFLATED_FRAME, 64, "f8"), PatchValueError, "layer.0.query.lora_b: codes: expected at least -7, got -8"),
        (put(DEFLATED_FRAME, 60, "03"), PatchFormatError, "codes: no stream of deflate: .*stored block lengths"),
        (put(DEFLATED_FRAME, 59, "00"), PatchFormatError, "codes: a stream of deflate that is cut"),
        (DEFLATED_FRAME[:-1], PatchFormatError, "codes: a stream of deflate that is cut"),
        (DEFLATED_FRAME[:59], PatchFormatError, "codes: a stream of deflate that is cut"),
        (stream_of(b"\0"), PatchFormatError, "codes: expected a stream of 2 bytes, got 1"),
        (DEFLATED_FRAME[:58], PatchFormatError, "length: expected 59 bytes, got 58"),
        (DEFLATED_FRAME + b"\0", PatchFormatError, "codes: a stream of deflate that is cut, or has something behind"),
        (stream_of(bytes(1 << 24)), PatchFormatError, "codes: expected a stream of 2 bytes, got 3"),
    ],
)
def test_hostile_bytes(frame: bytes, error: type[PatchError], message: str) -> None:
    with pytest.raises(error, match=message):
        read(frame)


@given(st.data())
def test_only_named_errors_come_out(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([FLOAT32, INT8, INT4, COLUMN, DEFLATED_FRAME, DIFFERENCES_FRAME]))
    start, length = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, 20))
    mutated = whole[:start] + data.draw(st.binary(max_size=40)) + whole[start + length :]
    with contextlib.suppress(PatchError):
        found = read(mutated, since=data.draw(st.sampled_from([OWN, 4])))
        assert all(np.isfinite(change.values).all() for change in found.values())
