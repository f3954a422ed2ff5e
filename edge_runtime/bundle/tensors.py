"""Tensor files: valid safetensors, written so that large tensors can be mapped instead of read.

The safetensors format allows no holes, so alignment is made by padding tensors named ``__pad.N`` and by spaces at
the end of the header. Reading is by ``mmap``; nothing is copied until it is touched.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.bundle.atomic import write_atomically
from edge_runtime.bundle.errors import BundleMissingError, TensorFileError

Array = npt.NDArray[Any]

ALIGN = 64 << 10
MAX_HEADER_BYTES = 1 << 20
MAX_DIMS = 8
PAD = "__pad."
# What opening says when a file is not there, or a folder stands where a file should, or the other way round.
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_DTYPES: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"  # the format's own key, texts by name; torch and peft write it, we do not
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]  # JSON has no largest integer; a file has


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=MAX_DIMS)]
    data_offsets: tuple[_Size, _Size]


def encode_tensors(tensors: Mapping[str, Array]) -> bytes:
    """Tensors as one safetensors file in memory, names sorted: equal tensors give equal bytes. For adapters.

    Raises:
        TensorFileError: see :func:`write_tensors`.
    """
    return b"".join(_chunks(tensors, align=1))


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write tensors to ``path`` atomically; those of 64 KiB and more start on a multiple of 64 KiB.

    Raises:
        TensorFileError: a tensor's name, dtype or number of dimensions is not for such a file, or there are too many.
    """
    write_atomically(path, _chunks(tensors, align=ALIGN))


def _check_writable(tensors: Mapping[str, Array]) -> None:
    for name, array in tensors.items():
        if name.startswith(PAD) or name == _METADATA:
            raise TensorFileError(f"{name}: this name is reserved")
        if array.dtype not in _NAMES:
            raise TensorFileError(f"{name}: dtype: expected one of {', '.join(_DTYPES)}, got {array.dtype}")
        if array.ndim > MAX_DIMS:
            raise TensorFileError(f"{name}: shape: expected at most {MAX_DIMS} dimensions, got {array.ndim}")


def _chunks(tensors: Mapping[str, Array], *, align: int) -> Iterator[bytes]:
    _check_writable(tensors)
    # Large tensors first, so that one run of padding separates each of them and small ones need none.
    ordered = sorted(tensors, key=lambda name: (align > 1 and tensors[name].nbytes < ALIGN, name))
    header: dict[str, object] = {}
    plan: list[tuple[int, Array | None]] = []
    offset = 0
    for name in ordered:
        array = np.ascontiguousarray(tensors[name])
        gap = -offset % align if array.nbytes >= ALIGN else -offset % min(align, 64)
        if gap:
            header[f"{PAD}{len(plan)}"] = {
                "dtype": "U8",
                "shape": [gap],
                "data_offsets": [offset, offset + gap],
            }
            plan.append((gap, None))
            offset += gap
        end = offset + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        plan.append((array.nbytes, array))
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % max(align, 8))
    if len(text) > MAX_HEADER_BYTES:
        raise TensorFileError(f"header: expected at most {MAX_HEADER_BYTES} bytes, got {len(text)}: too many tensors")
    yield struct.pack("<Q", len(text)) + text
    for size, content in plan:
        yield bytes(size) if content is None else content.tobytes()


def map_tensors(path: Path) -> dict[str, Array]:
    """Map the tensors of a file, read-only; the arrays keep the mapping alive.

    Raises:
        BundleMissingError: there is no such file.
        TensorFileError: the file is not safetensors as :func:`parse_tensors` wants it.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 8:
                raise TensorFileError(f"{path.name}: too short for a tensor file")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ABSENT as error:
        raise BundleMissingError(f"{path}: no such file") from error
    return parse_tensors(mapped, what=path.name)


def parse_tensors(data: bytes | mmap.mmap, *, what: str) -> dict[str, Array]:
    """The tensors of a safetensors file as views into ``data``, padding left out.

    Args:
        data: The whole file.
        what: Name used in messages.

    Raises:
        TensorFileError: header too large or not a header, unknown dtype, offsets that do not tile the file.
    """
    if len(data) < 8:
        raise TensorFileError(f"{what}: too short for a tensor file")
    (size,) = struct.unpack_from("<Q", data, 0)
    if size > MAX_HEADER_BYTES or size + 8 > len(data):
        raise TensorFileError(
            f"{what}: header length: expected at most {MAX_HEADER_BYTES} and inside the file, got {size}"
        )
    entries = _parse_header(data[8 : 8 + size], what)
    tensors: dict[str, Array] = {}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise TensorFileError(f"{what}: {name[:200]}: unknown dtype {entry.dtype[:20]!r}")
        count, itemsize = math.prod(entry.shape), np.dtype(dtype).itemsize
        # A zero hides from the length what stands beside it, but not from numpy, which multiplies the others.
        absurd = math.prod(length for length in entry.shape if length) * itemsize >= 2**63
        if start != position or end - start != count * itemsize or absurd:
            raise TensorFileError(f"{what}: {name[:200]}: offsets {start}..{end} do not fit shape {entry.shape}")
        if 8 + size + end > len(data):
            raise TensorFileError(f"{what}: {name[:200]}: ends at {8 + size + end}, after the file's {len(data)} bytes")
        position = end
        if not name.startswith(PAD):
            flat = np.frombuffer(data, dtype=dtype, count=count, offset=8 + size + start)
            tensors[name] = flat.reshape(entry.shape)
    if 8 + size + position != len(data):
        raise TensorFileError(f"{what}: length: expected {8 + size + position} bytes, got {len(data)}")
    return tensors


def _parse_header(header: bytes, what: str) -> dict[str, _Entry]:
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        msgspec.json.decode(raw.pop(_METADATA, msgspec.Raw(b"{}")), type=dict[str, str])
        return {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TensorFileError(f"{what}: header is not a table of tensors: {str(error)[:200]}") from error


def file_offset(array: Array) -> int | None:
    """Where a mapped array begins in its file, in bytes; None for an array that is not mapped."""
    mapped = _mapping(array)
    if mapped is None:
        return None
    return _address(array) - _address(np.frombuffer(mapped, np.uint8))


def release_pages(array: Array) -> None:
    """Give the pages of a mapped array back to the system; they are read again when touched.

    Nothing happens for an array that is not mapped, or on a system without ``madvise``.
    """
    mapped, start = _mapping(array), file_offset(array)
    if mapped is None or start is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    page_start = start // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, page_start, start + array.nbytes - page_start)


def _mapping(array: Array) -> mmap.mmap | None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def check_tensors(tensors: Mapping[str, Array], expected: Mapping[str, tuple[int, ...]], *, what: str) -> None:
    """Demand exactly these float32 tensors with these shapes, all finite.

    Raises:
        TensorFileError: naming every difference.
    """
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name, shape in expected.items():
        array = tensors.get(name)
        if array is None:
            continue
        if array.dtype != np.float32 or array.shape != shape:
            problems.append(f"{name}: expected float32 {shape}, got {array.dtype} {array.shape}")
        elif not np.isfinite(array).all():
            problems.append(f"{name}: holds NaN or infinity")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise TensorFileError(f"{what}: " + "; ".join(problems[:5]) + more)
