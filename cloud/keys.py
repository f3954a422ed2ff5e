"""The aggregator's two long-lived keys, each in a file of mode 0600: one signs plans, one the operator's requests."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from cloud.errors import DataError, DataMissingError

KEYS_FOLDER = "keys"  # in the data folder
PLAN_KEY = "plan.pem"
OPERATOR_KEY = "operator.pem"


@dataclass(frozen=True)
class Keys:
    """The private halves."""

    plan: Ed25519PrivateKey = field(repr=False)
    operator: Ed25519PrivateKey = field(repr=False)

    @property
    def plan_key(self) -> str:
        """Public half of the key that signs plans, hex."""
        return self.plan.public_key().public_bytes_raw().hex()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of that public key, hex; it travels in enrolment tokens."""
        return hashlib.sha256(self.plan.public_key().public_bytes_raw()).hexdigest()


def make_keys(folder: Path) -> None:
    """Write new keys into ``folder``.

    Raises:
        DataError: a key is there already, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in (PLAN_KEY, OPERATOR_KEY):
            pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(file, "wb") as stream:
                stream.write(pem)
                stream.flush()
                os.fsync(stream.fileno())
    except OSError as error:
        raise DataError(f"{folder}: keys cannot be written: {error.strerror}") from error


def load_keys(folder: Path) -> Keys:
    """Read the keys.

    Raises:
        DataMissingError: a key file is missing or holds no Ed25519 key.
    """
    return Keys(plan=_load(folder / PLAN_KEY), operator=_load(folder / OPERATOR_KEY))


def _load(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise DataMissingError(f"{path}: no key ({error.strerror}); `emberlora cloud init` makes it") from error
    except ValueError as error:
        raise DataMissingError(f"{path}: not a private key in PEM form") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise DataMissingError(f"{path}: expected an Ed25519 key, got {type(key).__name__}")
    return key
