"""The aggregator: the thin shell around round state, planner, sum and store.

One event loop owns it. What changes a round happens under one lock, in the order that makes a kill harmless: blob
durable, row committed, sum added, answer sent. Blobs are written side by side, before the lock; the rows of all that
are durable by then are committed together. Hashing, opening and summing run in worker threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloud import events, planning
from cloud.arriving import Arrival, Arrivals, Counted
from cloud.budgeting import with_budget
from cloud.config import Config
from cloud.download import PatchBook, RecentAdapters
from cloud.errors import CloudError, DataError
from cloud.keyring import Keyring
from cloud.keys import Keys
from cloud.making import MadeRound, RoundMaker
from cloud.members import Members
from cloud.metrics import METRIC_NAMES, summarise
from cloud.publish import PUBLISHED, publish
from cloud.rounds import (
    RoundApplied,
    StopAsked,
    TaskState,
    TimePassed,
    advance,
    check_update,
    first_state,
    resumed_state,
    take,
)
from cloud.store import OBJECTS, SCHEMA, UPDATES, Blobs, Database, Identity, Parts, RoundRecord, UpdateRecord
from cloud.store.database import DATABASE_NAME
from cloud.work import RoundWork, open_stored, open_update, start_work, without_outliers
from edge_runtime import wire
from edge_runtime.bundle import MANIFEST_NAME, Array, Bundle
from edge_runtime.wire.patch_frame import OWN, VERSION

_TICK_S = 0.5
_DOING = {"measure": "measuring", "train": "training", "finished": "finished"}  # what a plan's state means for a task


@dataclass(frozen=True)
class Surroundings:
    """What the aggregator takes from outside: Unix time in seconds, random bytes, and who is told what happens."""

    clock: Callable[[], float]
    entropy: Callable[[int], bytes]
    report: events.Report


class Aggregator:
    """One task. :meth:`start` before use, :meth:`close` after; both on the loop that serves it."""

    def __init__(self, config: Config, bundle: Bundle, *, keys: Keys, folder: Path, surroundings: Surroundings) -> None:
        self.config = config = with_budget(config, bundle.manifest)
        self._bundle = bundle
        self._folder = folder
        self._clock, self._report, entropy = surroundings.clock, surroundings.report, surroundings.entropy
        self._database = database = Database(folder / DATABASE_NAME)
        self._blobs = Blobs(folder / "blobs")
        self.parts = Parts(folder / "parts")
        self.keyring = keyring = Keyring(folder, keys, task=config.task.name, database=database, entropy=entropy)
        self.members = Members(database, keyring, clock=self._clock, entropy=entropy, report=self._report)
        self._maker = RoundMaker(config, bundle, keyring, database=database, blobs=self._blobs, entropy=entropy)
        self._lock = asyncio.Lock()
        self._arrivals = Arrivals(self._blobs, self._commit, counts=lambda receipt: self._state.counts(receipt))
        self._changed = asyncio.Event()
        self._kick = asyncio.Event()
        self._closing = False
        self._keeper: asyncio.Task[None] | None = None
        self._state: TaskState
        self._record: RoundRecord
        self._signed: wire.SignedPlan
        self._patches: PatchBook
        self._work: RoundWork | None = None
        self._history: tuple[wire.RoundStatus, ...] = ()
        self._recent = RecentAdapters(config.download_bits)
        # What is left to do of a round that is final; nothing that follows waits for it.
        self._leftover: Callable[[], Awaitable[None]] | None = None

    # Life

    async def start(self) -> None:
        """Open the store and go on where it left off, or begin round 0.

        Raises:
            DataError: the store is another task's, or lacks something it must hold.
        """
        try:
            identity = Identity(self.config.task.name, self._bundle.digest)
            found = await self._database.call(self._database.open, identity, migrate=True)
            if found != SCHEMA:
                self._report(events.DatabaseMigrated(found, SCHEMA))
            await self._database.call(self._database.begin_log, identity, self._clock())
            await self.keyring.start()
            await self.members.start()
            self._history = await self._database.call(self._database.history)
            record = await self._database.call(self._database.last_round)
            if record is None:
                await self._begin()
            else:
                await self._resume(record)
            self._leftover = functools.partial(self._destroy_keys, self._record)  # a kill may have come before it
        except BaseException:  # whatever stopped the start, the database's thread must end with it
            await self._database.close()
            raise
        self._keeper = asyncio.create_task(self._keep())

    def drain(self) -> None:
        """Send waiting devices away, so that a server that stops need not wait for them."""
        self._closing = True
        self._changed.set()

    async def close(self) -> None:
        """Write what is still in memory and close the store."""
        self.drain()
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        async with self._lock:
            try:
                await self.members.flush()
            except DataError as error:  # figures for people; nothing that was acknowledged waits in memory
                self._report(events.WorkFailed("at the end", str(error)))
            await self._database.close()

    async def _begin(self) -> None:
        state = first_state(planning.round_rules(self.config, 0), now=self._clock())
        new = await self._maker.first(state, now=self._clock())
        await self._database.call(self._database.open_round, new.record, adapter=new.digest)
        self._enter(state, new.record)

    async def _resume(self, record: RoundRecord) -> None:
        updates = await self._database.call(self._database.updates_of, record.round)
        finished = record.state == "finished"
        counted = {} if finished else {update.receipt.device: update.receipt for update in updates}
        rules = planning.round_rules(self.config, record.round)
        # The config may have changed; the open round has room for as many devices as its plan said.
        plan = self.keyring.known.open(record.plan).plan
        rules = replace(rules, devices_per_round=min(rules.devices_per_round, plan.update.max_devices))
        if finished:
            state = TaskState(rules, record.round, "finished", record.deadline)
        else:
            state = resumed_state(rules, round_=record.round, deadline=record.deadline, counted=counted)
        self._recent.recall(self._history)
        self._enter(state, record)
        published = await asyncio.to_thread(self._maker.published, record)
        await asyncio.to_thread(self._maker.check, record)
        work = self._work
        if work is not None:
            await asyncio.to_thread(self._sum_again, work, updates)
        await asyncio.to_thread(self._blobs.keep_only, UPDATES, {receipt.digest for receipt in counted.values()})
        await asyncio.to_thread(self.parts.keep_only, record.round)  # a kill may have come between round and tidying
        if self._history or finished:
            await asyncio.to_thread(self._publish, published.tensors, self._signed.plan.adapter)

    def _sum_again(self, work: RoundWork, updates: list[UpdateRecord]) -> None:
        """Open the stored updates of a round once more; sum and verdict are the same, whatever the order."""
        for device, update in open_stored(work, self._blobs.sealed(updates)):
            work.add(device, update, work.imprint(update))

    # Devices

    @property
    def finished(self) -> bool:
        """Whether the task has ended."""
        return self._state.phase == "finished"

    async def plan_after(self, device: str, *, task: str, after: int, wait_s: float) -> wire.SignedPlan | None:
        """The current plan once its round is later than ``after``, or None when ``wait_s`` pass without it.

        Raises:
            NotFoundError: another task.
            RoundAheadError: ``after`` is a later round than the current one.
            UnavailableError: the server is shutting down.
        """
        self.check_task(task)
        if after > (current := self._signed.plan.round):
            raise wire.RoundAheadError(
                f"device {device} is done with round {after}, and this aggregator is at {current}: was it restored?"
            )
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        while not self._closing:
            if self._signed.plan.round > after:
                self.members.saw(device)
                return self._signed
            self.members.saw(device)
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), max(end - loop.time(), 0))
            except asyncio.TimeoutError:
                return None
        raise wire.UnavailableError("the aggregator is shutting down; ask again later")

    def blob_path(self, digest: str) -> Path:
        """Where a bundle file or one of the newest adapters lies.

        Raises:
            NotFoundError: no such blob in this task.
        """
        if digest == self._bundle.digest:
            return self._bundle.path(MANIFEST_NAME)
        for name, entry in self._bundle.manifest.files.items():
            if entry.sha256 == digest:
                return self._bundle.path(name)
        if digest in self._recent.digests:
            return self._blobs.path(OBJECTS, digest)
        raise wire.NotFoundError(f"blob {digest[:80]!r}: not part of this task")

    async def patch(self, device: str, *, task: str, round_: int, since: int, reads: int) -> bytes:
        """What turns the adapter of round ``since`` into that of ``round_``, in a version that the device ``reads``.

        Raises:
            NotFoundError: another task, or a round that has not begun.
            RoundClosedError: a round that has ended.
            RequestFormatError: ``since`` is not before the round.
        """
        self.check_task(task)
        current, patches = self._signed.plan.round, self._patches
        if round_ != current:
            error = wire.RoundClosedError if round_ < current else wire.NotFoundError
            raise error(f"patch to round {round_}: expected round {current}, which is the current one")
        if not OWN <= since < round_:
            raise wire.RequestFormatError(
                f"patch to round {round_}: since: expected {OWN} to {round_ - 1}, got {since}"
            )
        data = await patches.get((since, reads >= VERSION))
        self.members.saw(device, sent_bytes=len(data))
        return data

    async def tell(self, device: str, *, task: str, capability: wire.Capability) -> None:
        """Keep what a device measured of itself.

        Raises:
            NotFoundError: another task.
        """
        self.check_task(task)
        await self.members.tell(device, capability)

    async def admit(self, device: str, *, task: str, round_: int, digest: str) -> wire.UpdateReceipt | tuple[int, ...]:
        """Say before its body is read whether an update could count.

        Returns:
            The first receipt if this very update was counted, now or in an earlier round; else the lengths in bytes
            that its body may have, one of them exactly, the longest first.

        Raises:
            NotFoundError: another task.
            UpdateConflictError, RoundClosedError, TaskFinishedError: the round's state forbids it.
        """
        self.check_task(task)
        try:
            known = check_update(self._state, device=device, round_=round_, digest=digest)
        except (wire.RoundClosedError, wire.TaskFinishedError):
            known = await self._database.call(self._database.receipt_of, round_, device)
            if known is None or known.digest != digest:
                raise
        return known or self._open_work().sealed_bytes

    async def submit(self, device: str, *, round_: int, digest: str, sealed: bytes) -> Counted:
        """Check and count a sealed update whose SHA-256 is ``digest`` (hex).

        Returns:
            The receipt, and whether it is new. It is durable and summed by then.

        Raises:
            UpdateError: what is wrong with it; nothing has changed then, in memory or on disk.
            RoundError: the round's state forbids it.
            DataError: the disk does not take it; nothing has changed then.
        """
        # Again after :meth:`admit`: the round may have ended while the body came in.
        known = check_update(self._state, device=device, round_=round_, digest=digest)
        if known is not None:
            return known, False
        work = self._open_work()
        update = await asyncio.to_thread(open_update, work, device, sealed)
        imprint = None if work.sketcher is None else await asyncio.to_thread(work.imprint, update)
        receipt = wire.UpdateReceipt(
            device=device, round=round_, digest=digest, weight=work.total.capped(update.weight)
        )
        record = UpdateRecord(receipt, len(sealed), self._clock(), update.metrics)
        # Shielded: a device that hangs up now must not leave a row without its share of the sum.
        arrival = Arrival(work, record, update, imprint)
        return await asyncio.shield(asyncio.create_task(self._arrivals.add(arrival, sealed)))

    async def _commit(self, arrivals: Sequence[Arrival]) -> Sequence[Counted | Exception]:
        """Count updates, in the order in which they came, with one wait for the disk."""
        receipts = [arrival.record.receipt for arrival in arrivals]
        async with self._lock:
            before = len(self._state.counted)
            state, found = take(self._state, receipts)
            new = [arrival for arrival, outcome in zip(arrivals, found, strict=True) if outcome is True]
            if new:
                await self._database.call(self._database.add_updates, [arrival.record for arrival in new])
                await asyncio.to_thread(_add_all, new)
            self._state = state
        if state.phase == "closed":
            self._kick.set()
        for received, arrival in enumerate(new, start=before + 1):
            self.members.saw(arrival.record.receipt.device)
            self._report(arrival.counted(received, state.rules.devices_per_round))
        return [
            (receipt, outcome) if isinstance(outcome, bool) else outcome
            for receipt, outcome in zip(receipts, found, strict=True)
        ]

    # Operator

    async def stop(self) -> None:
        """End the task; see :mod:`cloud.rounds` for what happens to an open round. Stopping twice does no harm."""
        async with self._lock:
            state = advance(self._state, StopAsked())
            if not self.finished:
                await self._database.call(self._database.note_stop, self._state.round, self._clock())
            if state.phase == "closed":
                self._state = state
                await self._apply()
            elif not self.finished:
                await self._end(state, None, summary=None)

    async def rotate_plan_key(self) -> wire.PlanKeyRotation:
        """Have the next round's plan signed with a new key; see :meth:`cloud.keyring.Keyring.rotate`."""
        async with self._lock:
            return await self.keyring.rotate(self._state, now=self._clock(), report=self._report)

    async def status(self) -> wire.TaskStatus:
        """Everything the operator may want to see."""
        devices = await self.members.statuses()
        head = await self._database.call(self._database.log_head)
        state = self._state
        return wire.TaskStatus(
            task=self.config.task.name,
            state=_DOING[self._signed.plan.state],
            round=state.round,
            rounds=state.rules.rounds,
            metric=METRIC_NAMES[self._bundle.manifest.task],
            received=len(state.counted),
            wanted=state.rules.devices_per_round,
            deadline=state.deadline,
            adapter=self._signed.plan.adapter,
            bytes_up=sum(device.bytes_up for device in devices),
            bytes_down=sum(device.bytes_down for device in devices),
            devices=devices,
            history=self._history,
            audit_head=head,
        )

    # Rounds

    async def tick(self) -> None:
        """Close the round if it is full or its time is over, and apply it.

        Raises:
            DataError: the disk does not take the result; the next tick tries again.
        """
        async with self._lock:
            before, state = self._state, advance(self._state, TimePassed(self._clock()))
            if state.deadline != before.deadline:
                await self._database.call(self._database.move_deadline, state.round, state.deadline)
                rules, received = state.rules, len(state.counted)
                self._report(events.DeadlineMoved(state.round, received, rules.min_devices, state.deadline))
            self._state = state
            if state.phase == "closed":
                await self._apply()

    async def _keep(self) -> None:
        said = ""
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._kick.wait(), _TICK_S)
            self._kick.clear()
            try:
                await self.tick()
                await self.members.flush()
                async with self._lock:
                    await self._make_up()
                said = ""
            except Exception as error:  # noqa: BLE001 - rounds must go on after any fault; it is reported, and retried
                if str(error) != said:  # once, not twice a second
                    self._report(events.WorkFailed(f"round {self._state.round}", f"{type(error).__name__}: {error}"))
                said = str(error)

    async def _apply(self) -> None:
        """Apply the mean of the closed round, without outliers. When this fails the round stays closed, and the next
        tick tries again."""
        updates = await self._database.call(self._database.updates_of, self._state.round)
        rule, least = self.config.outliers, self._state.rules.min_devices
        came = self._open_work()
        work, verdict = await asyncio.to_thread(
            without_outliers, came, updates, self._blobs.sealed, rule=rule, least=least
        )
        now = self._clock()
        summary = summarise(
            updates,
            task=self._bundle.manifest.task,
            round_=self._state.round,
            seconds=now - work.opened,
            state=work.signed.plan.state,
            verdict=verdict,
        )
        summary = msgspec.structs.replace(summary, idle=work.total.idle())
        state = advance(self._state, RoundApplied(now))
        state = replace(state, rules=planning.round_rules(self.config, state.round))
        await self._end(state, work, summary=summary)

    async def _end(self, state: TaskState, work: RoundWork | None, *, summary: wire.RoundStatus | None) -> None:
        """Make the round final in the store, with what came in it if ``work`` is given, then enter ``state``."""
        ended, received = self._signed.plan, len(self._state.counted)
        new = await self._maker.after(self._record, work, state, now=self._clock())
        if summary is not None:
            summary = msgspec.structs.replace(summary, adapter=new.digest)
        await self._database.call(
            self._database.end_round, ended.round, summary=summary, new=new.record, adapter=new.digest
        )
        self._recent.add(new.record.round, new.digest)  # the oldest is about to go
        self._leftover = functools.partial(self._tidy_up, new)
        try:
            await self._make_up()
        except CloudError as error:  # the round is final all the same, and the next tick tries again
            self._report(events.WorkFailed(f"after round {ended.round}", str(error)))
        self._enter(state, new.record)
        if summary is not None:
            self._history = (*self._history, summary)
            self._report(events.RoundApplied(summary, state.rules.rounds))
        if self.finished:
            discarded = received if summary is None else 0
            path = str(self._folder / PUBLISHED)
            self._report(events.TaskFinished(len(self._history), discarded, new.digest, path))
        await asyncio.to_thread(self.parts.keep_only, new.record.round)  # none of an older one is taken any more

    def _enter(self, state: TaskState, record: RoundRecord) -> None:
        signed = self.keyring.enter(record.plan)
        if record.round_key is None:
            self._work = None
        else:
            key = X25519PrivateKey.from_private_bytes(record.round_key)
            judged = self.config.outliers.enabled
            self._work = start_work(self._bundle, signed, key=key, opened=record.opened, judged=judged)
        self._state, self._record, self._signed = state, record, signed
        self._recent.add(record.round, signed.plan.adapter)
        self._patches = PatchBook(functools.partial(self._maker.patch, record, self._recent))
        self._changed.set()
        self._changed = asyncio.Event()

    async def _make_up(self) -> None:
        """Do what is left to do of a round that is final; the caller holds the lock.

        Raises:
            DataError: the disk does not take it; it is still left to do then.
        """
        if self._leftover is not None:
            await self._leftover()
            self._leftover = None

    async def _tidy_up(self, new: MadeRound) -> None:
        """What follows a round that is final."""
        await self._destroy_keys(new.record)
        # The next round may have begun by the time this is done: what is there is asked for before what is needed.
        there = await asyncio.to_thread(self._blobs.files, UPDATES)
        counted = {one.digest for one in self._state.counted.values() if one.round >= new.record.round}
        needed = counted | self._arrivals.landing
        await asyncio.to_thread(self._blobs.keep_only, UPDATES, needed, among=there)
        await asyncio.to_thread(self._blobs.keep_only, OBJECTS, self._recent.digests | {new.record.master})
        await asyncio.to_thread(self._publish, new.published, new.digest)

    async def _destroy_keys(self, record: RoundRecord) -> None:
        await self.keyring.retire(record.plan)
        await self._database.call(self._database.destroy_keys)

    def _publish(self, tensors: dict[str, Array], digest: str) -> None:
        publish(self._folder, self._bundle.manifest, tensors, digest=digest)

    def _open_work(self) -> RoundWork:
        if self._work is None:
            raise wire.TaskFinishedError(f"task {self.config.task.name}: has ended")
        return self._work

    def check_task(self, task: str) -> None:
        """Demand that a request is about this task; raises NotFoundError."""
        if task != self.config.task.name:
            raise wire.NotFoundError(f"task {task[:80]!r}: not served here")


def _add_all(arrivals: Sequence[Arrival]) -> None:
    for arrival in arrivals:
        arrival.count()
