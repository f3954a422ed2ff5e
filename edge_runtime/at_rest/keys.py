"""One storage key a device, and from it a key for every kind of file (HKDF, RFC 5869), so that a child process can be
given the keys of its own files and no other."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_runtime.at_rest.errors import StorageKeyFormatError

KEY_BYTES = 32
ID_BYTES = 8
_TEXT = re.compile(r"[0-9a-fA-F]{64}")

Entropy = Callable[[int], bytes]

# identity: private keys. record, update: the journal of unsent updates. frame: an update before it is sealed.
# residual, personal, importance: what is carried over. remembered: hidden states of examples. checkpoint: a training
# half done.
Purpose = Literal[
    "identity", "record", "update", "frame", "residual", "personal", "importance", "remembered", "checkpoint"
]


@dataclass(frozen=True)
class StorageKey:
    """32 secret bytes that everything else follows from."""

    secret: bytes

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise StorageKeyFormatError(f"storage key: expected {KEY_BYTES} bytes, got {len(self.secret)}")

    def __repr__(self) -> str:
        return f"StorageKey(id={self.id!r}, secret=…)"

    @classmethod
    def parse(cls, text: str) -> StorageKey:
        """From 64 hexadecimal digits, as ``openssl rand -hex 32`` prints them; white space around them is no matter.

        Raises:
            StorageKeyFormatError: they are not that; the message does not repeat them.
        """
        stripped = text.strip()
        if not _TEXT.fullmatch(stripped):
            raise StorageKeyFormatError(f"expected {2 * KEY_BYTES} hexadecimal digits")
        return cls(bytes.fromhex(stripped))

    def text(self) -> str:
        """As :meth:`parse` takes it."""
        return self.secret.hex()

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits that tell keys apart and say nothing else of them."""
        return _derive(self.secret, b"id", ID_BYTES).hex()

    def key_of(self, purpose: Purpose) -> bytes:
        """The key of one kind of file, 32 bytes."""
        return _derive(self.secret, b"file " + purpose.encode(), KEY_BYTES)


def derive(key: bytes, *, salt: bytes, info: bytes) -> bytes:
    """A key that follows from another, 32 bytes."""
    return HKDF(SHA256(), KEY_BYTES, salt, info).derive(key)


def _derive(secret: bytes, what: bytes, length: int) -> bytes:
    return HKDF(SHA256(), length, None, b"emberlora at rest 1 " + what).derive(secret)
