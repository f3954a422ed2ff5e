"""The key of a task's plans changes by a statement of the key before it, and devices follow from the one they trust.

A statement says "this task's plans are signed with that key from now on", signed with the old key under a prefix of
its own. A chain of them is every change of a task, in order; a device that slept through some follows them all. Who has
an old private key can make a statement too: this is for keys that are replaced before anybody else has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_runtime.wire.errors import PlanKeyError
from edge_runtime.wire.names import Hex32, Name

MAX_STATEMENTS = 128  # a chain of these fits into a message, the longest task name included


class KeyStatement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One change of a task's plan key; both keys are Ed25519 public keys."""

    task: Name
    old: Hex32
    new: Hex32
    signature: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{128}\Z")]  # with the old key, hex


class PlanKeyChain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GET /v1/tasks/{task}/plan-keys: every change of the task's plan key, the first one first."""

    statements: Annotated[tuple[KeyStatement, ...], msgspec.Meta(max_length=MAX_STATEMENTS)] = ()


def state_key(task: str, old: Ed25519PrivateKey, new: Ed25519PublicKey) -> KeyStatement:
    """The statement of ``old`` that the task's plans are signed with ``new`` from now on."""
    keys = old.public_key().public_bytes_raw().hex(), new.public_bytes_raw().hex()
    return KeyStatement(task, *keys, old.sign(_text(task, *keys)).hex())


def follow_keys(statements: Sequence[KeyStatement], *, task: str, trusted: str) -> tuple[str, ...]:
    """The keys to which ``trusted`` leads, hex, the newest last; none when no statement follows it.

    What stands before ``trusted`` is passed over: it is signed by nothing that is trusted.

    Raises:
        PlanKeyError: the chain does not start at ``trusted``, or breaks after it, or leads back.
    """
    if len(statements) > MAX_STATEMENTS:
        raise PlanKeyError(f"plan keys: too many: expected at most {MAX_STATEMENTS} statements, got {len(statements)}")
    starts = [number for number, statement in enumerate(statements) if statement.old == trusted]
    if not starts:
        if not statements or statements[-1].new == trusted:
            return ()
        raise PlanKeyError(f"plan keys: no statement is by the key that is trusted, {trusted[:12]}")
    reached = [trusted]
    for number, statement in enumerate(statements[starts[0] :], start=starts[0]):
        _check(statement, what=f"plan keys: statement {number}", task=task, old=reached[-1])
        if statement.new in reached:
            raise PlanKeyError(f"plan keys: statement {number}: leads back to key {statement.new[:12]}")
        reached.append(statement.new)
    return tuple(reached[1:])


def _check(statement: KeyStatement, *, what: str, task: str, old: str) -> None:
    if statement.task != task:
        raise PlanKeyError(f"{what}: expected task {task}, got {statement.task}")
    if statement.old != old:
        raise PlanKeyError(f"{what}: expected one by key {old[:12]}, got {statement.old[:12]}")
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(old))
        key.verify(bytes.fromhex(statement.signature), _text(task, old, statement.new))
    except InvalidSignature as error:
        raise PlanKeyError(f"{what}: not signed by key {old[:12]}") from error


def _text(task: str, old: str, new: str) -> bytes:
    return f"emberlora plan key 1\n{task}\n{old}\n{new}\n".encode()
