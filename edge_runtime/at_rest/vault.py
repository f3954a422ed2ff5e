"""Encrypted files: ChaCha20-Poly1305 (RFC 8439) under the key of their purpose, bound to where they belong.

    offset  bytes
    0       8   magic "embrest1"
    8       8   id of the storage key
    16      16  purpose, ASCII, zeros after it
    32      4   round, unsigned; 0xffffffff for none
    36      8   owner: the first bytes of SHA-256 over device and task
    44      8   length of the plain bytes, unsigned
    52      12  nonce, random
    64          the encrypted bytes, and their tag of 16 bytes

Big-endian. Everything before the encrypted bytes is authenticated with them, and so are the whole names of device and
task, which are not in the file. The header is there to name what is wrong; what is believed is the tag.

Nonces are drawn, not counted: a count would have to survive crashes and copies of a home that are put back. A key
may draw 2**32 of them before two are alike with a chance above 2**-32; a home writes a few a round.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from edge_runtime.at_rest.errors import (
    AlteredError,
    MisplacedError,
    NotEncryptedError,
    TruncatedError,
    WrongStorageKeyError,
)
from edge_runtime.at_rest.keys import Entropy, Purpose, StorageKey

NO_ROUND: Final = 0xFFFFFFFF
NONCE_BYTES = 12
TAG_BYTES = 16
_MAGIC = b"embrest1"
_HEADER = struct.Struct(">8s8s16sI8sQ12s")
_MAX_BYTES = (1 << 31) - 1 - TAG_BYTES  # what the cipher takes at once; adapters end at 1 GiB

OVERHEAD_BYTES = _HEADER.size + TAG_BYTES


class Grant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a child process needs to open and write some kinds of a device's files; it goes over standard input."""

    device: str
    task: str
    key_id: str  # hex
    keys: dict[str, str]  # purpose -> hex

    def __repr__(self) -> str:
        return f"Grant(device={self.device!r}, task={self.task!r}, keys of {sorted(self.keys)})"


class Vault:
    """Encrypts and opens the files of one device in one task."""

    def __init__(self, grant: Grant, *, entropy: Entropy = os.urandom) -> None:
        """``entropy`` is for nonces, of which no two may be alike."""
        self._grant = grant
        self._ciphers = {purpose: ChaCha20Poly1305(bytes.fromhex(key)) for purpose, key in grant.keys.items()}
        self._key_id = bytes.fromhex(grant.key_id)
        names = grant.device.encode() + b"\0" + grant.task.encode()  # neither has a zero in it
        self._names, self._owner = names, hashlib.sha256(names).digest()[:8]
        self._entropy = entropy

    def __repr__(self) -> str:
        return f"Vault({self._grant!r})"

    @classmethod
    def of(
        cls, key: StorageKey, purposes: tuple[Purpose, ...], *, device: str, task: str, entropy: Entropy = os.urandom
    ) -> Vault:
        """The vault of a device for some purposes."""
        keys: dict[str, str] = {purpose: key.key_of(purpose).hex() for purpose in purposes}
        return cls(Grant(device, task, key.id, keys), entropy=entropy)

    def grant(self, *purposes: Purpose) -> Grant:
        """What a child process needs for these purposes alone."""
        keys: Mapping[str, str] = self._grant.keys
        return msgspec.structs.replace(self._grant, keys={purpose: keys[purpose] for purpose in purposes})

    def key_of(self, purpose: Purpose) -> bytes:
        """The key of a kind of file that has a format of its own, 32 bytes."""
        return bytes.fromhex(self._grant.keys[purpose])

    def encrypt(self, data: bytes, purpose: Purpose, *, round_: int = NO_ROUND, bound: bytes = b"") -> bytes:
        """The bytes of a file.

        Args:
            data: Its plain bytes.
            purpose: What kind of file it is.
            round_: Which round it belongs to, if to one.
            bound: Bytes that must be the same when it is opened, and are kept elsewhere.
        """
        header = _HEADER.pack(
            _MAGIC, self._key_id, purpose.encode(), round_, self._owner, len(data), self._entropy(NONCE_BYTES)
        )
        return header + self._ciphers[purpose].encrypt(header[-NONCE_BYTES:], data, self._bound(header, bound))

    def open(self, data: bytes, purpose: Purpose, *, what: str, round_: int | None = None, bound: bytes = b"") -> bytes:
        """The plain bytes of a file.

        Args:
            data: Its bytes.
            purpose: What it must be.
            what: Its name, for messages.
            round_: The round it must belong to; None: any.
            bound: As it was encrypted.

        Raises:
            NotEncryptedError, WrongStorageKeyError, MisplacedError, TruncatedError, AlteredError: as they say.
        """
        self._check(data[: _HEADER.size], len(data), purpose, what=what, round_=round_)
        header = data[: _HEADER.size]
        try:
            return self._ciphers[purpose].decrypt(
                header[-NONCE_BYTES:], memoryview(data)[_HEADER.size :], self._bound(header, bound)
            )
        except InvalidTag as error:
            raise AlteredError(f"{what}: altered: its authentication fails") from error

    def read(self, path: Path, purpose: Purpose, *, round_: int | None = None) -> bytes:
        """The plain bytes of the file at ``path``; the whole of it is read only when its header is right.

        Raises:
            OSError: it cannot be read; FileNotFoundError where there is none.
            AtRestError: as :meth:`open`.
        """
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(_HEADER.size)
            self._check(header, size, purpose, what=str(path), round_=round_)
            rest = file.read(size - _HEADER.size)
        return self.open(header + rest, purpose, what=str(path), round_=round_)

    def _bound(self, header: bytes, bound: bytes) -> bytes:
        """What is authenticated: the header's length is fixed, the names' is stated, so no two lists look alike."""
        return b"".join((header, len(self._names).to_bytes(4, "big"), self._names, bound))

    def _check(self, header: bytes, size: int, purpose: Purpose, *, what: str, round_: int | None) -> None:
        if not header.startswith(_MAGIC):
            raise NotEncryptedError(f"{what}: not an encrypted file: expected it to begin with {_MAGIC!r}")
        if len(header) < _HEADER.size:
            raise TruncatedError(f"{what}: truncated: expected at least {OVERHEAD_BYTES} bytes, got {size}")
        _, key_id, found, of_round, owner, length, _ = _HEADER.unpack(header)
        if key_id != self._key_id:
            raise WrongStorageKeyError(
                f"{what}: encrypted under another storage key: it needs {key_id.hex()}, this is {self._key_id.hex()}"
            )
        if found != purpose.encode().ljust(16, b"\0"):
            name = found.rstrip(b"\0").decode("ascii", "replace")
            raise MisplacedError(f"{what}: in another file's place: expected {purpose!r}, got {name!r}")
        if owner != self._owner:
            raise MisplacedError(f"{what}: of another device or task than {self._grant.device} in {self._grant.task}")
        if round_ is not None and of_round != round_:
            raise MisplacedError(f"{what}: of another round: expected {_shown(round_)}, got {_shown(of_round)}")
        if length > _MAX_BYTES or size != length + OVERHEAD_BYTES:
            raise TruncatedError(f"{what}: truncated: expected {length + OVERHEAD_BYTES} bytes, got {size}")


def is_encrypted(data: bytes) -> bool:
    """Whether a file that begins with these bytes, at least eight, is of this format."""
    return data.startswith(_MAGIC)


def _shown(round_: int) -> str:
    return "none" if round_ == NO_ROUND else str(round_)
