"""The keys of a running task, and the one change they know: the plan key gives way to a new one.

The new key lies in a file of its own before the statement is a row, and the row is there before the key signs. The
round that is open keeps its plan and key; the next one is signed with the new key, and when it is in the store the new
file takes the place of the old, which is then gone. A kill between any two of these leaves what the next start, or the
same request again, goes on from: a file without a row is nothing yet, a row without a round waits for it, and a round
with two files is tidied up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloud import events
from cloud.keys import KEYS_FOLDER, NEXT_PLAN_KEY, PLAN_KEY, Keys, PlanKeys, private_key, write_new
from cloud.rounds import TaskState
from cloud.store import Database
from cloud.store.blobs import sync_path
from cloud.store.space import write_error
from edge_runtime import wire
from edge_runtime.wire.plankeys import MAX_STATEMENTS


class Keyring:
    """Which key signs what, of one task. :meth:`start` before use; the caller's lock is around what changes it."""

    def __init__(
        self, data: Path, keys: Keys, *, task: str, database: Database, entropy: Callable[[int], bytes]
    ) -> None:
        self._folder = data / KEYS_FOLDER
        self._keys = keys
        self._task = task
        self._database = database
        self._entropy = entropy
        self.known = PlanKeys.of(keys.plan, ())  # of the stored plans
        self._signs = self._in_force = keys.plan

    @property
    def operator(self) -> Ed25519PublicKey:
        """The key of the operator's requests."""
        return self._keys.operator.public_key()

    @property
    def chain(self) -> wire.PlanKeyChain:
        """Every change of the plan key."""
        return wire.PlanKeyChain(self.known.statements)

    @property
    def plan_key(self) -> str:
        """Public half of the key that signed the plan in force, hex."""
        return self._in_force.public_key().public_bytes_raw().hex()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of it, hex; it travels in enrolment tokens."""
        return hashlib.sha256(self._in_force.public_key().public_bytes_raw()).hexdigest()

    async def start(self) -> None:
        """Read which keys the task has had, and forget a new one that a kill left without its statement.

        Raises:
            DataMissingError: the newest of them is not in the folder of keys.
        """
        await self._read()
        if self._keys.next_plan is not None and self._keys.next_plan is not self._signs:
            (self._folder / NEXT_PLAN_KEY).unlink(missing_ok=True)
            self._keys = replace(self._keys, next_plan=None)

    def sign(self, plan: wire.Plan) -> wire.SignedPlan:
        """The plan of a round that is made now."""
        return wire.sign_plan(plan, self._signs)

    def enter(self, plan: bytes) -> wire.SignedPlan:
        """Put a stored plan in force.

        Raises:
            DataMissingError: the key that signed it is not in the folder of keys.
        """
        self._in_force = private_key(self._keys, self.known.signer(plan))
        return self.known.open(plan)

    def prove(self, signed: wire.SignedPlan, request: wire.SignedRequest) -> str:
        """What shows a device that a plan is the one in force now: that it answers this request of its."""
        return wire.sign_answer(signed.digest, request, self._in_force)

    async def rotate(self, state: TaskState, *, now: float, report: events.Report) -> wire.PlanKeyRotation:
        """Make a new key; plans of the rounds after the one of ``state`` are signed with it.

        Asked again before that round has ended, it changes nothing and gives the same answer.

        Raises:
            TaskFinishedError: no plan follows.
            NotPermittedError: a chain of one more statement would not fit into a message.
            DataError: the disk does not take the key or the statement; the key is then as it was.
        """
        if state.phase == "finished":
            raise wire.TaskFinishedError(f"task {self._task}: has ended; no plan follows")
        await self._read()  # a statement may have been stored although its request failed
        if self._signs is self._keys.next_plan and self._in_force is not self._signs:
            return self._rotation(state.round + 1, already=True)
        await self._retire_old()  # a full disk may have kept it; the new file would overwrite the key in force
        statements = self.known.statements
        if len(statements) >= MAX_STATEMENTS:
            raise wire.NotPermittedError(f"plan key: has changed {MAX_STATEMENTS} times; begin a new task")
        new = Ed25519PrivateKey.from_private_bytes(self._entropy(32))
        statement = wire.state_key(self._task, self._signs, new.public_key())
        await asyncio.to_thread(_write, self._folder / NEXT_PLAN_KEY, new)
        self._keys = replace(self._keys, next_plan=new)
        await self._database.call(self._database.add_key_statement, len(statements), statement, now)
        await self._read()
        answer = self._rotation(state.round + 1, already=False)
        report(events.PlanKeyChanged(answer.new, answer.round))
        return answer

    async def retire(self, plan: bytes) -> None:
        """Delete the private key that signs nothing any more, now that this plan is the last one stored.

        Raises:
            DataError: the disk does not take it; it is still to be done then.
        """
        if self.known.signer(plan) == self.known.public[-1]:
            await self._retire_old()

    async def _retire_old(self) -> None:
        if self._signs is not self._keys.next_plan:
            return
        try:
            await asyncio.to_thread(_replace, self._folder / NEXT_PLAN_KEY, self._folder / PLAN_KEY)
        except OSError as error:
            raise write_error(f"{self._folder}: the old plan key cannot be deleted", error) from error
        self._keys = replace(self._keys, plan=self._signs, next_plan=None)

    async def _read(self) -> None:
        self.known = PlanKeys.of(self._keys.plan, await self._database.call(self._database.key_statements))
        self._signs = private_key(self._keys, self.known.public[-1])

    def _rotation(self, round_: int, *, already: bool) -> wire.PlanKeyRotation:
        last = self.known.statements[-1]
        return wire.PlanKeyRotation(old=last.old, new=last.new, round=round_, already=already)


def _write(path: Path, key: Ed25519PrivateKey) -> None:
    """Write a key in place of what may be there, atomically and durably.

    Raises:
        DataError: the disk does not take it; what was there is still there then.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial.unlink(missing_ok=True)
        write_new(partial, key)
        partial.replace(path)
        sync_path(path.parent)
    except OSError as error:
        raise write_error(f"{path}: cannot be written", error) from error


def _replace(source: Path, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # an earlier attempt got so far, and failed to sync the folder
        source.replace(target)
    sync_path(target.parent)
