"""Making the next round: its adapter in both forms, its plan, and the row that keeps them.

The blobs are durable before the row is, so a kill in between leaves blobs that nothing names, which the next round
sweeps.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloud import planning
from cloud.config import Config
from cloud.download import (
    PatchKey,
    Published,
    RecentAdapters,
    Since,
    make_patch,
    own_adapter,
    publish_master,
)
from cloud.errors import DataMissingError
from cloud.keyring import Keyring
from cloud.planner import Choice, PastRound
from cloud.quantising import with_quantisation
from cloud.rounds import TaskState
from cloud.store import OBJECTS, Blobs, Database, RoundRecord, UpdateRecord
from cloud.work import RoundWork, next_adapter, open_stored, read_adapter
from edge_runtime import wire
from edge_runtime.bundle import Array, Bundle, adapter_ranks, encode_tensors
from edge_runtime.wire.patch_frame import OWN


@dataclass(frozen=True)
class MadeRound:
    """A round ready to be stored; its adapter is, in both forms."""

    record: RoundRecord
    digest: str  # of the published adapter, which the plan names
    published: dict[str, Array]


@dataclass(frozen=True)
class _Start:
    """What a round starts from: the tensors a policy judges, what they were a round ago, what was published then.

    ``idle``: components that the round before was to train, and too few devices carried, by module.
    """

    tensors: dict[str, Array]
    before: dict[str, Array] | None
    published: Published
    idle: dict[str, tuple[int, ...]] = field(default_factory=dict)


class RoundMaker:
    """Makes the rounds of one task from its config, bundle, and what is stored."""

    def __init__(
        self,
        config: Config,
        bundle: Bundle,
        keys: Keyring,
        *,
        database: Database,
        blobs: Blobs,
        entropy: Callable[[int], bytes],
    ) -> None:
        self._config = config
        self._bundle = bundle
        self._keys = keys
        self._database = database
        self._blobs = blobs
        self._entropy = entropy
        self._opened: dict[int, planning.OpenedRound] = {}  # by number: a stored round never changes

    async def first(self, state: TaskState, *, now: float) -> MadeRound:
        """The round that begins the task, opened at ``now`` (Unix seconds)."""
        tensors = planning.first_adapter(self._config, self._bundle)
        own = own_adapter(self._bundle, adapter_ranks(self._bundle.manifest, tensors))
        start = _Start(tensors, None, own)
        return await self._make(state, start, now=now)

    async def after(self, ended: RoundRecord, work: RoundWork | None, state: TaskState, *, now: float) -> MadeRound:
        """The round of ``state``, or the finished state, after ``ended``.

        Args:
            ended: The round that ends.
            work: What came in it; None when its updates are discarded.
            state: What follows.
            now: Unix time in seconds.
        """
        updates = None
        if self._config.task.aggregation == "stack":
            updates = await self._database.call(self._database.updates_of, ended.round)
        start = await asyncio.to_thread(self._moved, ended, work, updates)
        return await self._make(state, start, now=now)

    def published(self, record: RoundRecord) -> Published:
        """What devices train from in a stored round.

        Raises:
            DataMissingError: it is not in the store, or damaged.
        """
        changed = msgspec.json.decode(record.changed, type=tuple[Since, ...])
        return Published(self._read(self._plan(record).adapter), changed)

    def check(self, record: RoundRecord) -> None:
        """Demand that the store has the master of a stored round.

        Raises:
            DataMissingError: it has not, or it is damaged.
        """
        self._blobs.get(OBJECTS, record.master)

    def patch(self, record: RoundRecord, recent: RecentAdapters, key: PatchKey) -> bytes:
        """The patch to the adapter of a stored round; ``recent`` is what may still be here of earlier ones."""
        plan, (since, deflated), bits = self._plan(record), key, self._config.download_bits
        older = self._older(plan, recent, since) if deflated and bits != 32 else None  # nothing else is of differences
        return make_patch(self._bundle, plan, self.published(record), key, older=older, bits=bits)

    def _older(self, plan: wire.Plan, recent: RecentAdapters, since: int) -> Mapping[str, Array] | None:
        """What a patch to a plan starts from, if it is still here: a copy of the folder has no older adapters."""
        if since == OWN:
            return own_adapter(self._bundle, plan.ranks).tensors
        digest = recent.of(since)
        with contextlib.suppress(DataMissingError):
            return self._read(digest) if digest else None
        return None

    def _moved(self, ended: RoundRecord, work: RoundWork | None, updates: list[UpdateRecord] | None) -> _Start:
        before, published = self._read(ended.master), self.published(ended)
        if work is None:
            return _Start(before, before, published)
        again = None
        if updates is not None:  # by device: sums of floating-point numbers depend on their order
            updates = sorted(updates, key=lambda update: update.receipt.device)
            updates = [update for update in updates if update.receipt.device not in work.aside]
            again = open_stored(work, self._blobs.sealed(updates))
        moved = next_adapter(self._bundle.manifest, before, work, again)
        return _Start(moved, before, published, work.total.idle())

    async def _make(self, state: TaskState, start: _Start, *, now: float) -> MadeRound:
        config, bundle = self._config, self._bundle
        evidence = await asyncio.to_thread(planning.gather_evidence, bundle, start.tensors, start.before, start.idle)
        records = await self._database.call(self._database.rounds)  # the last of them is the round that ends here
        past = await asyncio.to_thread(self._past, records, evidence)
        choice = planning.choose_modules(config, bundle, state, evidence, past)
        published, adapter, master = await asyncio.to_thread(self._store, state, choice, start)
        finished = state.phase == "finished"
        key = None if finished else X25519PrivateKey.from_private_bytes(self._entropy(32))
        round_key = "" if key is None else key.public_key().public_bytes_raw().hex()
        plan = planning.make_plan(config, bundle, state, choice=choice, adapter=adapter, round_key=round_key)
        plan = with_quantisation(config, bundle, plan, past)
        signed = self._keys.sign(plan)
        self._keys.known.open(signed.data)  # a plan no device would take is not stored either
        record = RoundRecord(
            round=state.round,
            state="finished" if finished else "open",
            plan=signed.data,
            opened=now,
            deadline=state.deadline,
            evidence=msgspec.json.encode(evidence).decode(),
            master=master,
            changed=msgspec.json.encode(published.changed).decode(),
            round_key=None if key is None else key.private_bytes_raw(),
        )
        return MadeRound(record, adapter.digest, published.tensors)

    def _past(self, records: Sequence[RoundRecord], evidence: planning.Evidence) -> tuple[PastRound, ...]:
        for record in records:
            if record.round not in self._opened:
                self._opened[record.round] = planning.open_round(record, self._keys.known)
        return planning.past_rounds([self._opened[record.round] for record in records], evidence)

    def _store(self, state: TaskState, choice: Choice, start: _Start) -> tuple[Published, planning.Adapter, str]:
        """Make both forms durable: what is published, as the plan says it, and the master's digest."""
        config, manifest = self._config, self._bundle.manifest
        master = planning.planned_adapter(config, self._bundle, state, choice, start.tensors)
        bits = config.download_bits
        published = publish_master(manifest, start.published, master, round_=state.round, bits=bits)
        data = encode_tensors(published.tensors)
        digest = self._blobs.put(OBJECTS, data)
        kept = digest if bits == 32 else self._blobs.put(OBJECTS, encode_tensors(master))
        return published, planning.Adapter(digest, len(data)), kept

    def _plan(self, record: RoundRecord) -> wire.Plan:
        return self._keys.known.open(record.plan).plan

    def _read(self, digest: str) -> dict[str, Array]:
        return read_adapter(self._bundle, self._blobs.get(OBJECTS, digest))
