"""The aggregator's two long-lived keys, each in a file of mode 0600: one signs plans, one the operator's requests.

The one that signs plans may be followed by another; see :mod:`cloud.keyring`. What the earlier ones signed stays valid.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from cloud.errors import DataError, DataMissingError
from edge_runtime import wire

KEYS_FOLDER = "keys"  # in the data folder
PLAN_KEY = "plan.pem"
NEXT_PLAN_KEY = "plan-next.pem"  # from its statement until the first round that it signs
OPERATOR_KEY = "operator.pem"
NEXT_OPERATOR_KEY = "operator-next.pem"  # while a change is under way; see :mod:`cloud.operator_key`


@dataclass(frozen=True)
class Keys:
    """The private halves."""

    plan: Ed25519PrivateKey = field(repr=False)
    operator: Ed25519PrivateKey = field(repr=False)
    next_plan: Ed25519PrivateKey | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PlanKeys:
    """The keys that a task's plans have been signed with, public halves in hex, the newest last.

    ``statements``: what each but the first was made known with.
    """

    public: tuple[str, ...]
    statements: tuple[wire.KeyStatement, ...]

    @classmethod
    def of(cls, plan: Ed25519PrivateKey, statements: Sequence[wire.KeyStatement]) -> PlanKeys:
        """The keys that ``plan`` is one of, by the statements of the task.

        Raises:
            DataMissingError: it is none of them, or they are no chain.
        """
        own = _public(plan)
        if not statements:
            return cls((own,), ())
        first = statements[0]
        try:
            public = (first.old, *wire.follow_keys(statements, task=first.task, trusted=first.old))
        except wire.PlanKeyError as error:
            raise DataMissingError(f"the stored statements of plan keys are damaged: {error}") from error
        if own not in public:
            raise DataMissingError(f"{PLAN_KEY}: is none of this task's keys: expected one of {len(public)}")
        return cls(public, tuple(statements))

    def open(self, data: bytes) -> wire.SignedPlan:
        """A stored plan.

        Raises:
            PlanSignatureError, PlanFormatError: none of the keys has signed it, or it is no plan.
        """
        return self._opened(data)[0]

    def signer(self, data: bytes) -> str:
        """Which of the keys has signed a stored plan; raises as :meth:`open` does."""
        return self._opened(data)[1]

    def _opened(self, data: bytes) -> tuple[wire.SignedPlan, str]:
        refused: wire.PlanSignatureError | None = None
        for public in reversed(self.public):
            try:
                return wire.open_plan(data, Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))), public
            except wire.PlanSignatureError as error:
                refused = refused or error
        raise refused or ValueError("a task has no plan key: a fault of the caller")


def private_key(keys: Keys, public: str) -> Ed25519PrivateKey:
    """The private half of a plan key.

    Raises:
        DataMissingError: it is not here.
    """
    for key in (keys.plan, keys.next_plan):
        if key is not None and _public(key) == public:
            return key
    raise DataMissingError(f"keys: the private half of plan key {public[:12]} is not there: they are of another time")


def make_keys(folder: Path) -> None:
    """Write new keys into ``folder``.

    Raises:
        DataError: a key is there already, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in (PLAN_KEY, OPERATOR_KEY):
            write_new(folder / name, Ed25519PrivateKey.generate())
    except OSError as error:
        raise DataError(f"{folder}: keys cannot be written: {error.strerror}") from error


def write_new(path: Path, key: Ed25519PrivateKey) -> None:
    """Write a key to a file that is not there yet, durably; may raise OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(file, "wb") as stream:
        stream.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        stream.flush()
        os.fsync(stream.fileno())


def load_keys(folder: Path) -> Keys:
    """Read the keys.

    Raises:
        DataMissingError: a key file is missing or holds no Ed25519 key.
    """
    waiting = folder / NEXT_PLAN_KEY
    try:
        next_plan = load_key(waiting)
    except DataMissingError:
        if waiting.exists():
            raise
        next_plan = None  # none waits, or it has taken the other's place just now
    return Keys(plan=load_key(folder / PLAN_KEY), operator=load_key(folder / OPERATOR_KEY), next_plan=next_plan)


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read one key; raises as :func:`load_keys` does."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise DataMissingError(f"{path}: no key ({error.strerror}); `emberlora cloud init` makes it") from error
    except ValueError as error:
        raise DataMissingError(f"{path}: not a private key in PEM form") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise DataMissingError(f"{path}: expected an Ed25519 key, got {type(key).__name__}")
    return key
