"""A file of hidden states by example, only ever appended to; what a crash leaves of it can be used.

    header   magic "embhid2\\n", level (uint32), ground (32 bytes), salt (32 bytes), tag (16 bytes)
    record   name (16 bytes), tokens, width (uint32 each), nonce (12 bytes), encrypted scales (float32) and values
             (float16), tag (16 bytes)

Little-endian. A record that is cut short ends the file, one that does not authenticate is as good as none. It is a
cache: nobody needs to keep it.

It holds what a model made of private text, from which much of the text can be told. So every record is encrypted with
ChaCha20-Poly1305, one at a time, since they are read in another order than they were written. The key is the file's
own: HKDF of a secret over salt and header, so that no record passes in another file. Names are keyed digests: whoever
has a text and the file cannot tell whether it was trained on. Lengths can be read: how many tokens each example has.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from edge_runtime.at_rest import Entropy
from edge_runtime.at_rest.keys import derive
from edge_runtime.bundle import Array

KEY_BYTES = 16
SECRET_BYTES = 32
_MAGIC = b"embhid2\n"
_SALT_BYTES, _NONCE_BYTES, _TAG_BYTES = 32, 12, 16
_HEADER = struct.Struct(f"<8sI32s{_SALT_BYTES}s")
_RECORD = struct.Struct(f"<{KEY_BYTES}sII{_NONCE_BYTES}s")
_TOP_EXPONENT = 15  # a token's largest value is scaled below 2**15; half precision ends at 65,504

HEADER_BYTES = _HEADER.size + _TAG_BYTES


def record_bytes(tokens: int, width: int) -> int:
    """What an example takes in a file."""
    return _RECORD.size + _payload_bytes(tokens, width) + _TAG_BYTES


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
class Secret:
    """What files are encrypted under: 32 bytes, and where salts and nonces come from."""

    key: bytes
    entropy: Entropy = os.urandom

    def __repr__(self) -> str:
        return "Secret(…)"


class _Cipher:
    """Encrypts the records of one file, whose header this is."""

    def __init__(self, secret: Secret, header: bytes) -> None:
        self._entropy = secret.entropy
        key = derive(secret.key, salt=header[-_SALT_BYTES:], info=b"emberlora hidden states 2 " + header)
        self._naming = derive(key, salt=b"", info=b"names")
        self._cipher = ChaCha20Poly1305(derive(key, salt=b"", info=b"records"))
        # Shows that a file is of this secret.
        self.tag = derive(key, salt=b"", info=b"header")[:_TAG_BYTES]

    def name(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._naming, digest_size=KEY_BYTES).digest()

    def record(self, name: bytes, tokens: int, width: int, payload: bytes) -> bytes:
        head = _RECORD.pack(name, tokens, width, self._entropy(_NONCE_BYTES))
        return head + self._cipher.encrypt(head[-_NONCE_BYTES:], payload, head)

    def payload(self, record: bytes) -> bytes:
        """Of a whole record. Raises InvalidTag."""
        head = record[: _RECORD.size]
        return self._cipher.decrypt(head[-_NONCE_BYTES:], memoryview(record)[_RECORD.size :], head)


@dataclass(frozen=True)
class _Place:
    offset: int  # of the record
    tokens: int
    width: int


class HiddenFile:
    """An open file. Every method but :meth:`close` may raise ``OSError``.

    Attributes:
        ground: Of everything in it.
        bytes: Its length.
    """

    def __init__(self, file: IO[bytes], ground: Ground, cipher: _Cipher) -> None:
        self.ground = ground
        self.bytes = 0
        self._file = file
        self._cipher = cipher
        self._places: dict[bytes, _Place] = {}  # by name

    @classmethod
    def create(cls, ground: Ground, secret: Secret, *, folder: Path, path: Path | None) -> HiddenFile:
        """An empty one at ``path``, in place of what is there; or one in ``folder`` that has no name.

        The system takes a file without a name back however the process ends.
        """
        if path is None:
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # open until close()
        else:
            path.unlink(missing_ok=True)  # not truncated: it may still be read as the file of a lower level
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b", buffering=0)
        header = _HEADER.pack(_MAGIC, ground.level, ground.digest, secret.entropy(_SALT_BYTES))
        made = cls(file, ground, _Cipher(secret, header))
        try:
            made._append(header + made._cipher.tag)
        except OSError:
            made.close()
            raise
        return made

    @classmethod
    def open(cls, path: Path, secret: Secret) -> HiddenFile | None:
        """The file at ``path``; None where there is none that can be used, such as one of another secret."""
        try:
            file = path.open("r+b", buffering=0)
        except FileNotFoundError:
            return None
        with contextlib.ExitStack() as unless_used:
            unless_used.callback(file.close)
            header = file.read(_HEADER.size)
            if len(header) != _HEADER.size or not header.startswith(_MAGIC):
                return None
            _, level, digest, _ = _HEADER.unpack(header)
            found = cls(file, Ground(level, digest), _Cipher(secret, header))
            if not hmac.compare_digest(file.read(_TAG_BYTES), found._cipher.tag):
                return None
            found._places, found.bytes = _scan(file.fileno())
            file.truncate(found.bytes)
            unless_used.pop_all()
        return found

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return self._cipher.name(key) in self._places

    def append(self, key: bytes, rows: Array) -> None:
        """Keep an example's hidden state, shape (tokens, width), finite and below 2**127."""
        tokens, width = rows.shape
        name, place = self._cipher.name(key), _Place(self.bytes, tokens, width)
        self._append(self._cipher.record(name, tokens, width, _pack(rows)))
        self._places[name] = place

    def read(self, key: bytes) -> Array | None:
        """An example's hidden state, shape (tokens, width), float32; None, and forgotten, where it is damaged."""
        name = self._cipher.name(key)
        place = self._places[name]
        data = os.pread(self._file.fileno(), record_bytes(place.tokens, place.width), place.offset)
        try:
            return _unpack(self._cipher.payload(data), place.tokens)
        except (InvalidTag, ValueError):  # ValueError: less is left of it than a nonce
            del self._places[name]
            return None

    def close(self) -> None:
        """Let go of the file; one without a name is gone then."""
        self._file.close()

    def _append(self, data: bytes) -> None:
        if os.pwrite(self._file.fileno(), data, self.bytes) != len(data):
            raise OSError("the disk took only a part")
        self.bytes += len(data)


def _scan(descriptor: int) -> tuple[dict[bytes, _Place], int]:
    """Places of all whole records, and where they end."""
    places, at, end = {}, HEADER_BYTES, os.fstat(descriptor).st_size
    while len(head := os.pread(descriptor, _RECORD.size, at)) == _RECORD.size:
        name, tokens, width, _ = _RECORD.unpack(head)
        after = at + record_bytes(tokens, width)
        if after > end:
            break
        places[name] = _Place(at, tokens, width)
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
