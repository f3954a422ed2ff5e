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
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge_runtime.bundle.errors import BundleMissingError, TensorFileError

Array = npt.NDArray[Any]

ALIGN = 64 << 10
MAX_HEADER_BYTES = 1 << 20
PAD = "__pad."
_DTYPES: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def encode_tensors(tensors: Mapping[str, Array]) -> bytes:
    """Tensors as one safetensors file in memory, names sorted: equal tensors give equal bytes. For adapters."""
    return b"".join(_chunks(tensors, align=1))


def write_tensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """Write tensors to ``path`` atomically; those of 64 KiB and more start on a multiple of 64 KiB."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        for chunk in _chunks(tensors, align=ALIGN):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _chunks(tensors: Mapping[str, Array], *, align: int) -> Iterator[bytes]:
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
    except FileNotFoundError as error:
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
    try:
        entries = msgspec.json.decode(data[8 : 8 + size], type=dict[str, _Entry])
    except (msgspec.DecodeError, RecursionError) as error:
        raise TensorFileError(f"{what}: header is not a table of tensors: {error}") from error
    tensors: dict[str, Array] = {}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise TensorFileError(f"{what}: {name}: unknown dtype {entry.dtype!r}")
        count = math.prod(entry.shape)
        if start != position or end - start != count * np.dtype(dtype).itemsize or min(entry.shape, default=0) < 0:
            raise TensorFileError(f"{what}: {name}: offsets {start}..{end} do not fit shape {entry.shape}")
        position = end
        if not name.startswith(PAD):
            flat = np.frombuffer(data, dtype=dtype, count=count, offset=8 + size + start)
            tensors[name] = flat.reshape(entry.shape)
    if 8 + size + position != len(data):
        raise TensorFileError(f"{what}: length: expected {8 + size + position} bytes, got {len(data)}")
    return tensors


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
