"""From an update that was opened to one that counts: its blob is made durable, then it waits for the next commit.

Blobs are written side by side. A commit takes all that are on the disk by then, and waits for it twice, for their names
and for their rows, whether it counts one update or fifty. Nobody waits for company: what arrives while no commit runs
is committed at once and alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from cloud import events
from cloud.aggregate import Imprint
from cloud.store import UPDATES, Blobs, UpdateRecord
from cloud.work import RoundWork
from edge_runtime.wire import Update, UpdateReceipt

Counted = tuple[UpdateReceipt, bool]  # and whether it is new
# Counts updates in the order in which they came and answers each with a receipt or with why it alone is refused; what
# it raises holds for all of them.
Commit = Callable[["Sequence[Arrival]"], Awaitable[Sequence[Counted | Exception]]]


@dataclass(frozen=True)
class Arrival:
    """An update that was opened and checked, and what will be kept of it if it counts."""

    work: RoundWork
    record: UpdateRecord
    update: Update
    imprint: Imprint | None  # None where nobody is judged

    def count(self) -> None:
        """Add it to its round's sum."""
        self.work.add(self.record.receipt.device, self.update, self.imprint)

    def counted(self, received: int, wanted: int) -> events.UpdateCounted:
        """What is told of it: so many of those that are wanted are there with it."""
        record = self.record
        return events.UpdateCounted(
            round_=record.receipt.round,
            device=record.receipt.device,
            received=received,
            wanted=wanted,
            weight=record.receipt.weight,
            bytes=record.bytes,
            loss_start=record.metrics.loss_start,
            loss_end=record.metrics.loss_end,
        )


class Arrivals:
    """Updates on their way; all of them on one event loop."""

    def __init__(self, blobs: Blobs, commit: Commit, *, counts: Callable[[UpdateReceipt], bool]) -> None:
        """``counts`` says whether this update is the one that counts of its device, so that its blob is needed."""
        self._blobs = blobs
        self._commit = commit
        self._counts = counts
        self._landing: Counter[str] = Counter()
        self._waiting: list[tuple[Arrival, asyncio.Future[Counted]]] = []
        self._committing: asyncio.Task[None] | None = None

    @property
    def landing(self) -> frozenset[str]:
        """Digests of updates on their way, whose blobs must not be tidied away."""
        return frozenset(self._landing)

    async def add(self, arrival: Arrival, sealed: bytes) -> Counted:
        """Make a sealed update durable and count it.

        Raises:
            WireError: it is refused; its blob is gone again.
            DataError: the disk does not take it; the same.
        """
        receipt = arrival.record.receipt
        digest = receipt.digest
        self._landing[digest] += 1
        try:
            await asyncio.to_thread(self._blobs.write, UPDATES, sealed, digest)
            return await self._next_commit(arrival)
        finally:
            self._landing[digest] -= 1
            if not self._landing[digest]:  # the same update may be sent twice at once
                del self._landing[digest]
                if not self._counts(receipt):  # nothing is awaited since, so this still holds
                    self._blobs.drop(UPDATES, digest)

    async def _next_commit(self, arrival: Arrival) -> Counted:
        done: asyncio.Future[Counted] = asyncio.get_running_loop().create_future()
        self._waiting.append((arrival, done))
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all())
        return await done

    async def _commit_all(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                outcomes = await self._outcomes([arrival for arrival, _ in group])
                for (_, done), outcome in zip(group, outcomes, strict=True):
                    if done.done():  # the loop is being closed
                        continue
                    if isinstance(outcome, Exception):
                        done.set_exception(outcome)
                    else:
                        done.set_result(outcome)
        finally:
            self._committing = None

    async def _outcomes(self, arrivals: Sequence[Arrival]) -> Sequence[Counted | Exception]:
        try:
            await asyncio.to_thread(self._blobs.sync_names, UPDATES)
            return await self._commit(arrivals)
        except Exception as error:  # noqa: BLE001 - whatever it is, each of those who wait must hear of it
            return [error] * len(arrivals)
