"""A device changes its key: the request is signed with the old one, and carries a proof that the new one is its own."""

from __future__ import annotations

from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_runtime.wire.errors import RequestFormatError, SignatureError
from edge_runtime.wire.names import Hex32


class NewKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PUT /v1/devices/{device}/key."""

    signing_key: Hex32  # Ed25519 public key
    proof: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{128}\Z")]  # Ed25519 signature with it, hex


def new_key(device: str, key: Ed25519PrivateKey) -> NewKey:
    """The message with which ``device`` names its new key."""
    public = key.public_key().public_bytes_raw().hex()
    return NewKey(public, key.sign(_text(device, public)).hex())


def check_new_key(device: str, message: NewKey) -> None:
    """Demand that whoever named the key has it.

    Raises:
        RequestFormatError: it is no key.
        SignatureError: the proof is not by this key for this device.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(message.signing_key))
        key.verify(bytes.fromhex(message.proof), _text(device, message.signing_key))
    except ValueError as error:
        raise RequestFormatError(f"new key of {device}: not a key") from error
    except InvalidSignature as error:
        raise SignatureError(f"new key of {device}: the proof is not by this key for this device") from error


def _text(device: str, public: str) -> bytes:
    return f"emberlora key 1\n{device}\n{public}\n".encode()
