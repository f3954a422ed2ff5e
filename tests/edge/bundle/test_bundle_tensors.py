"""Tensor files: their bytes, what the real safetensors library makes of them, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_runtime.bundle import (
    Array,
    BundleMissingError,
    TensorFileError,
    check_tensors,
    encode_tensors,
    map_tensors,
    parse_tensors,
    write_tensors,
)
from edge_runtime.bundle.tensors import ALIGN, MAX_HEADER_BYTES, PAD

DTYPES = [np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8]
GOLDEN = (
    bytes.fromhex("8000000000000000")  # header length 128: with these eight a multiple of eight
    + b'{"m.lora_a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
    + b'"m.lora_b":{"dtype":"F32","shape":[1,1],"data_offsets":[8,12]}}  '  # padded with spaces
    + bytes.fromhex("0000803f00000040")  # m.lora_a: 1, 2
    + bytes.fromhex("0000003f")  # m.lora_b: 0.5
)


def file_of(header: object, data: bytes = b"") -> bytes:
    """A tensor file with any header; bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def offsets(path: Path) -> dict[str, int]:
    """Where in the file each tensor begins, padding included; read without the code under test."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    return {name: 8 + size + said["data_offsets"][0] for name, said in header.items()}


def test_golden_bytes() -> None:
    tensors = {"m.lora_b": np.array([[0.5]], np.float32), "m.lora_a": np.array([[1, 2]], np.float32)}
    assert encode_tensors(tensors) == GOLDEN
    parsed = parse_tensors(GOLDEN, what="golden")
    assert parsed["m.lora_a"].tolist() == [[1, 2]]
    assert parsed["m.lora_b"].tolist() == [[0.5]]


def test_golden_padding(tmp_path: Path) -> None:
    """A large tensor after a large one that ends off the grid: one run of padding between them, none after."""
    path = tmp_path / "w.safetensors"
    large = np.arange(ALIGN + 1, dtype=np.uint8)
    write_tensors(path, {"small": np.array([7], np.int8), "b": large, "a": large})
    assert offsets(path) == {
        "a": ALIGN,  # after header and spaces
        "__pad.1": 2 * ALIGN + 1,
        "b": 3 * ALIGN,
        "__pad.3": 4 * ALIGN + 1,  # small tensors are on multiples of 64
        "small": 4 * ALIGN + 64,
    }
    assert path.stat().st_size == 4 * ALIGN + 65


ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
TABLES = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "__metadata__" and not name.startswith(PAD)), ARRAYS, max_size=6
)


@given(tensors=TABLES)
def test_round_trip_and_the_real_library(tensors: dict[str, Array]) -> None:
    data = encode_tensors(tensors)
    assert data == encode_tensors(dict(reversed(tensors.items())))
    for read in (parse_tensors(data, what="ours"), safetensors.numpy.load(data)):
        assert set(read) == set(tensors)
        for name, array in tensors.items():
            assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
            assert read[name].tobytes() == array.tobytes()


SIZES = st.lists(st.sampled_from([0, 1, 63, 64, 65, ALIGN - 1, ALIGN, ALIGN + 1, 3 * ALIGN // 2]), max_size=6)


@given(sizes=SIZES, dtype=st.sampled_from([np.float32, np.uint8]))
def test_mapped_files(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], dtype: type[np.generic]) -> None:
    path = tmp_path_factory.mktemp("mapped") / "w.safetensors"
    tensors = {f"t{index}": np.full(size, index + 1, dtype) for index, size in enumerate(sizes)}
    write_tensors(path, tensors)
    places = offsets(path)
    for name, array in tensors.items():
        assert places[name] % (ALIGN if array.nbytes >= ALIGN else 64) == 0
    library = safetensors.numpy.load_file(path)
    mapped = map_tensors(path)
    assert set(mapped) == set(tensors) == {name for name in library if not name.startswith(PAD)}
    assert not any(library[name].any() for name in library if name.startswith(PAD))
    for name, array in tensors.items():
        np.testing.assert_array_equal(mapped[name], array)
        np.testing.assert_array_equal(library[name], array)


def test_mapping_copies_nothing_and_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": np.ones(4 << 20, np.uint8)})
    tracemalloc.start()
    try:
        array = map_tensors(path)["a"]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2


def test_unaligned_and_strided_arrays_are_written_in_c_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for view in (array.T, array[:, ::2], array[::-1]):
        np.testing.assert_array_equal(parse_tensors(encode_tensors({"a": view}), what="x")["a"], view)


U8 = entry([2], 0, 2, "U8")
DEEP = b'{"a":' + b"[" * 100_000
DEFECTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "seven bytes": (bytes(7), "too short"),
    "header past the end": (struct.pack("<Q", 3) + b"{}", "header length: .* got 3"),
    "header of 2**64 - 1": (b"\xff" * 16, "got 18446744073709551615"),
    "large header": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * (MAX_HEADER_BYTES + 1), "header length"),
    "no header": (struct.pack("<Q", 0), "not a table"),
    "not JSON": (file_of(b"{]"), "not a table"),
    "list": (file_of([]), "not a table"),
    "deep": (file_of(DEEP), "not a table"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "not a table"),
    "not UTF-8 dtype": (file_of(b'{"a":{"dtype":"\xff","shape":[],"data_offsets":[0,1]}}', b"1"), "not a table"),
    "entry of another kind": (file_of({"a": 1}), "not a table"),
    "unknown member": (file_of({"a": U8 | {"x": 1}}, b"12"), "unknown field"),
    "missing member": (file_of({"a": {"dtype": "U8", "shape": [2]}}, b"12"), "missing required field"),
    "metadata not texts": (file_of({"__metadata__": {"a": 1}}), "not a table"),
    "unknown dtype": (file_of({"a": entry([1], 0, 2, "BF16")}, b"12"), "a: unknown dtype 'BF16'"),
    "long dtype": (file_of({"a": entry([1], 0, 2, "X" * 9999)}, b"12"), "unknown dtype"),
    "negative shape": (file_of({"a": entry([-1, -2], 0, 2, "U8")}, b"12"), "not a table"),
    "float shape": (file_of({"a": entry([2.0], 0, 2, "U8")}, b"12"), "not a table"),  # type: ignore[list-item]  # hostile
    "nine dimensions": (file_of({"a": entry([1] * 9, 0, 1, "U8")}, b"1"), "length <= 8"),
    "huge integers": (file_of({"a": entry([10**4000] * 8, 0, 2)}, b"12"), "not a table"),
    "hidden by a zero": (file_of({"a": entry([0, 2**48, 2**48], 0, 0)}), "do not fit shape"),
    "too long for its shape": (file_of({"a": entry([1], 0, 2, "U8")}, b"12"), "do not fit shape"),
    "backwards": (file_of({"a": entry([2], 2, 0, "U8")}, b"12"), "do not fit shape"),
    "hole at the start": (file_of({"a": entry([2], 1, 3, "U8")}, b"123"), "do not fit shape"),
    "hole between": (file_of({"a": U8, "b": entry([2], 3, 5, "U8")}, b"12345"), "b: offsets 3..5"),
    "overlap": (file_of({"a": U8, "b": entry([2], 1, 3, "U8")}, b"123"), "b: offsets 1..3"),
    "the same twice": (file_of({"a": U8, "b": U8}, b"12"), "offsets 0..2"),
    "truncated": (file_of({"a": U8}, b"1"), "after the file's"),
    "one byte more": (file_of({"a": U8}, b"123"), "length: expected"),
    "bytes without a tensor": (file_of({}, b"1"), "length: expected"),
}


@pytest.mark.parametrize(("data", "message"), DEFECTS.values(), ids=DEFECTS)
def test_defect_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    for read in (lambda: parse_tensors(data, what=path.name), lambda: map_tensors(path)):
        with pytest.raises(TensorFileError, match=f"^w.safetensors: .*{message}") as caught:
            read()
        assert len(str(caught.value)) < 500


def test_metadata_of_other_writers_is_ignored() -> None:
    data = safetensors.numpy.save({"a": np.ones(3, np.float32)}, metadata={"format": "pt"})
    assert parse_tensors(data, what="theirs")["a"].tolist() == [1, 1, 1]


@given(data=st.data())
def test_fuzz(data: st.DataObject) -> None:
    start, length = data.draw(st.integers(0, len(GOLDEN))), data.draw(st.integers(0, 20))
    changed = GOLDEN[:start] + data.draw(st.binary(max_size=40)) + GOLDEN[start + length :]
    for hostile in (changed, data.draw(st.binary(max_size=200)), file_of(data.draw(st.binary(max_size=200)))):
        try:
            tensors = parse_tensors(hostile, what="x")
        except TensorFileError:
            continue
        assert sum(array.nbytes for array in tensors.values()) <= len(hostile)


def test_memory_of_a_hostile_header_is_bounded() -> None:
    """As many empty tensors as a header holds."""
    text = ",".join(f'"{index}":{json.dumps(entry([0], 0, 0), separators=(",", ":"))}' for index in range(18_000))
    data = file_of(b"{" + text.encode() + b"}")
    assert MAX_HEADER_BYTES * 0.8 < len(data) < MAX_HEADER_BYTES
    tracemalloc.start()
    try:
        assert len(parse_tensors(data, what="x")) == 18_000
        assert tracemalloc.get_traced_memory()[1] < 24 * MAX_HEADER_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.parent.rmdir()])
def test_missing_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "sub" / "w.safetensors"
    path.parent.mkdir()
    make(path)
    with pytest.raises(BundleMissingError, match="no such file"):
        map_tensors(path)


UNWRITABLE: list[tuple[str, Array, str]] = [
    ("a", np.zeros(1, np.float64), "a: dtype: .* got float64"),
    ("a", np.zeros(1, ">f4"), "a: dtype: .* got >f4"),
    ("a", np.zeros(1, object), "a: dtype: .* got object"),
    ("a", np.zeros((1,) * 9, np.uint8), "a: shape: expected at most 8 dimensions, got 9"),
    ("__pad.0", np.zeros(1, np.uint8), "reserved"),
    ("__metadata__", np.zeros(1, np.uint8), "reserved"),
    ("a" * MAX_HEADER_BYTES, np.zeros(1, np.uint8), "header: expected at most"),
]


@pytest.mark.parametrize(("name", "array", "message"), UNWRITABLE, ids=range(len(UNWRITABLE)))
def test_what_cannot_be_read_back_is_not_written(tmp_path: Path, name: str, array: Array, message: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    for write in (lambda: encode_tensors({name: array}), lambda: write_tensors(path, {name: array})):
        with pytest.raises(TensorFileError, match=message):
            write()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"w.safetensors": b"old"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"a": np.ones(3, np.float32)})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"w.safetensors": b"old"}


def test_check_names_every_difference() -> None:
    good = np.zeros((2, 3), np.float32)
    check_tensors({"a": good}, {"a": (2, 3)}, what="adapter")
    bad = {
        "extra": good,
        "shape": good.T,
        "dtype": good.astype(np.float16),
        "nan": np.array([np.nan], np.float32),
        "inf": np.array([-np.inf], np.float32),
    }
    expected = {"gone": (1,), "shape": (2, 3), "dtype": (2, 3), "nan": (1,), "inf": (1,)}
    with pytest.raises(TensorFileError) as caught:
        check_tensors(bad, expected, what="adapter")
    assert str(caught.value) == (
        "adapter: missing gone; unexpected extra; shape: expected float32 (2, 3), got float32 (3, 2); "
        "dtype: expected float32 (2, 3), got float16 (2, 3); nan: holds NaN or infinity and 1 more"
    )
