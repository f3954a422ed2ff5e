"""A file of hidden states by example, only ever appended to; what a crash leaves of it can be used.

    header   magic "embhid1\\n", level (uint32), ground (32 bytes)
    record   key (16 bytes), tokens, width, CRC-32 of the rest (uint32 each), scales (float32), values (float16)

Little-endian. A record that is cut short ends the file, one whose checksum is wrong is as good as none. It is a cache:
nobody needs to keep it, and it holds what a model made of private text, so it is readable by its owner only.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from edge_runtime.bundle import Array

KEY_BYTES = 16
_MAGIC = b"embhid1\n"
_HEADER = struct.Struct("<8sI32s")
_RECORD = struct.Struct(f"<{KEY_BYTES}sIII")
_TOP_EXPONENT = 15  # a token's largest value is scaled below 2**15; half precision ends at 65,504

HEADER_BYTES = _HEADER.size


def record_bytes(tokens: int, width: int) -> int:
    """What an example takes in a file."""
    return _RECORD.size + _payload_bytes(tokens, width)


def _payload_bytes(tokens: int, width: int) -> int:
    return tokens * (2 * width + 4)


@dataclass(frozen=True)
class Ground:
    """What hidden states follow from besides the example.

    Attributes:
        level: How many blocks, from the first one up, made them.
        digest: Of these blocks, their weights and their adapter, 32 bytes.
    """

    level: int
    digest: bytes


@dataclass(frozen=True)
class _Place:
    offset: int  # of the payload
    tokens: int
    width: int
    checksum: int


class HiddenFile:
    """An open file. Every method but :meth:`close` may raise ``OSError``.

    Attributes:
        ground: Of everything in it.
        bytes: Its length.
    """

    def __init__(self, file: IO[bytes], ground: Ground, *, places: dict[bytes, _Place], length: int) -> None:
        self.ground = ground
        self.bytes = length
        self._file = file
        self._places = places

    @classmethod
    def create(cls, ground: Ground, *, folder: Path, path: Path | None) -> HiddenFile:
        """An empty one at ``path``, in place of what is there; or one in ``folder`` that has no name.

        The system takes a file without a name back however the process ends.
        """
        if path is None:
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # open until close()
        else:
            path.unlink(missing_ok=True)  # not truncated: it may still be read as the file of a lower level
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b", buffering=0)
        made = cls(file, ground, places={}, length=0)
        try:
            made._append(_HEADER.pack(_MAGIC, ground.level, ground.digest))
        except OSError:
            made.close()
            raise
        return made

    @classmethod
    def open(cls, path: Path) -> HiddenFile | None:
        """The file at ``path``; None where there is none that can be used."""
        try:
            file = path.open("r+b", buffering=0)
        except FileNotFoundError:
            return None
        with contextlib.ExitStack() as unless_used:
            unless_used.callback(file.close)
            header = file.read(_HEADER.size)
            if len(header) != _HEADER.size or not header.startswith(_MAGIC):
                return None
            _, level, digest = _HEADER.unpack(header)
            places, length = _scan(file.fileno())
            file.truncate(length)
            unless_used.pop_all()
        return cls(file, Ground(level, digest), places=places, length=length)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def append(self, key: bytes, rows: Array) -> None:
        """Keep an example's hidden state, shape (tokens, width), finite and below 2**127."""
        payload = _pack(rows)
        tokens, width = rows.shape
        place = _Place(self.bytes + _RECORD.size, tokens, width, zlib.crc32(payload))
        self._append(_RECORD.pack(key, tokens, width, place.checksum) + payload)
        self._places[key] = place

    def read(self, key: bytes) -> Array | None:
        """An example's hidden state, shape (tokens, width), float32; None, and forgotten, where it is damaged."""
        place = self._places[key]
        data = os.pread(self._file.fileno(), _payload_bytes(place.tokens, place.width), place.offset)
        if zlib.crc32(data) != place.checksum:
            del self._places[key]
            return None
        return _unpack(data, place.tokens)

    def close(self) -> None:
        """Let go of the file; one without a name is gone then."""
        self._file.close()

    def _append(self, data: bytes) -> None:
        if os.pwrite(self._file.fileno(), data, self.bytes) != len(data):
            raise OSError("the disk took only a part")
        self.bytes += len(data)


def _scan(descriptor: int) -> tuple[dict[bytes, _Place], int]:
    """Places of all whole records, and where they end."""
    places, at, end = {}, _HEADER.size, os.fstat(descriptor).st_size
    while len(head := os.pread(descriptor, _RECORD.size, at)) == _RECORD.size:
        key, tokens, width, checksum = _RECORD.unpack(head)
        after = at + record_bytes(tokens, width)
        if after > end:
            break
        places[key] = _Place(at + _RECORD.size, tokens, width, checksum)
        at = after
    return places, at


def _pack(rows: Array) -> bytes:
    """Scales of all tokens, then the scaled values in half precision."""
    exponents = np.frexp(np.abs(rows).max(axis=1))[1] - _TOP_EXPONENT
    # Powers of two, so that scaling is exact; not below the smallest normal number, whose inverse is finite.
    scales = np.ldexp(np.float32(1), np.maximum(exponents, -126)).astype(np.float32)
    return b"".join((scales.tobytes(), (rows / scales[:, None]).astype(np.float16).tobytes()))


def _unpack(data: bytes, tokens: int) -> Array:
    """What :func:`_pack` was given, shape (tokens, width), float32."""
    scales = np.frombuffer(data, np.float32, tokens)
    values = np.frombuffer(data, np.float16, offset=scales.nbytes).reshape(tokens, -1)
    return np.asarray(values.astype(np.float32) * scales[:, None])
