"""What ``emberlora cloud audit`` finds and prints, from the data folder, whether or not the server runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from cloud import audit
from cloud.config import Config
from cloud.console import columns
from cloud.errors import AuditEntryError, DataMissingError
from cloud.kept import open_kept
from cloud.publish import adapter_of_file
from cloud.tracing import TracedRound
from cloud.tracing import trace as find_rounds


class Verdict(msgspec.Struct, frozen=True):
    """What ``audit verify`` says of a log.

    Attributes:
        whole: Every entry follows from those before it, and log and store say the same.
        entries: How many there are.
        head: Digest of the newest, hex; empty when there is none.
        broken: Number of the entry at which it breaks.
        how: In words; None when it is whole.
    """

    whole: bool
    entries: int
    head: str
    broken: int | None = None
    how: str | None = None

    def __str__(self) -> str:
        if self.whole:
            return f"whole: {self.entries} entries, as stored; head {self.head}"
        return f"audit log: {self.how}" if self.broken is None else f"audit log: entry {self.broken}: {self.how}"


class ShownEntry(msgspec.Struct, frozen=True):
    """An entry as ``audit show --json`` prints it; ``time`` is Unix seconds."""

    number: int
    time: float
    entry: audit.Entry
    previous: str
    digest: str


@dataclass(frozen=True)
class Wanted:
    """Which entries to show; None: whatever it is. ``since`` is Unix seconds."""

    kind: str | None = None
    device: str | None = None
    round: int | None = None
    since: float | None = None

    def takes(self, shown: ShownEntry) -> bool:
        """Whether the entry is one of them; one that names no device or round is of none."""
        entry = shown.entry
        return (
            self.kind in (None, entry.__struct_config__.tag)
            and self.device in (None, getattr(entry, "device", None))
            and self.round in (None, getattr(entry, "round", None))
            and (self.since is None or shown.time >= self.since)
        )


async def verify(config: Config, head: str | None) -> Verdict:
    """Recompute the chain and compare it with the store, both as they are at one instant.

    Args:
        config: Of the task.
        head: A digest noted earlier, hex, which must be in the chain.

    Raises:
        DataError, BundleError: see :func:`cloud.kept.open_kept`.
    """
    async with open_kept(config) as (database, _):
        audited = await database.call(database.audited)
    return judge(audited.links, audited.facts, head)


def judge(links: Sequence[audit.Link], facts: frozenset[str], head: str | None) -> Verdict:
    """The verdict on a log; see :func:`verify`."""
    last = links[-1].digest if links else ""
    broken = audit.check_chain(links) or audit.check_facts(links, facts)
    if broken is not None:
        return Verdict(False, len(links), last, broken.number, broken.how)
    if head is not None and head not in {link.digest for link in links}:
        how = f"the head {head[:12]} is not in it: its end was cut off, or it was written anew"
        return Verdict(False, len(links), last, how=how)
    return Verdict(True, len(links), last)


async def show(config: Config, wanted: Wanted, *, as_json: bool) -> list[str]:
    """The wanted entries, a line each; they are not checked.

    Raises:
        DataMissingError: the log holds no entry of this kind, device, round and time.
        AuditEntryError: an entry cannot be read.
        DataError, BundleError: see :func:`cloud.kept.open_kept`.
    """
    async with open_kept(config) as (database, _):
        audited = await database.call(database.audited)
    chosen = [shown for shown in map(_shown, audited.links) if wanted.takes(shown)]
    if not chosen:
        raise DataMissingError(f"{config.data_path}: the audit log holds no such entry")
    if as_json:
        return [msgspec.json.encode(shown).decode() for shown in chosen]
    return list(columns([tuple(_cells(shown)) for shown in chosen]))


async def trace(config: Config, digest: str) -> tuple[Verdict, tuple[TracedRound, ...]]:
    """The rounds that made an adapter, if the log is whole; the verdict on it comes first, without any rounds if not.

    Args:
        config: Of the task.
        digest: SHA-256 of an adapter that a plan names, or of the published ``adapter_model.safetensors``, hex.

    Raises:
        DataMissingError: neither is known here.
        DataError, BundleError: see :func:`cloud.kept.open_kept`.
        PlanError: a stored plan is not signed with a key of the task.
    """
    async with open_kept(config) as (database, kept):
        audited = await database.call(database.audited)
        updates = await database.call(database.updates)
        aside = await database.call(database.set_aside)
    verdict = judge(audited.links, audited.facts, None)
    if not verdict.whole:
        return verdict, ()
    plans = [kept.keys.open(record.plan) for record in kept.records]
    adapter = adapter_of_file(config.data_path, digest) or digest
    updates = [update for update in updates if (update.receipt.round, update.receipt.device) not in aside]
    rounds = find_rounds(kept.records, plans, updates, adapter)
    if rounds is None:
        raise DataMissingError(f"adapter {digest[:12]}: no plan of this task names it, and it is not published here")
    return verdict, rounds


def trace_lines(rounds: Sequence[TracedRound]) -> Iterator[str]:
    """Rounds and their updates for people; digests of updates in full."""
    updates = [update for round_ in rounds for update in round_.updates]
    devices = {update.device for update in updates}
    began = "" if rounds else "; the task began with it"
    yield f"rounds: {len(rounds)}, updates: {len(updates)}, devices: {len(devices)}{began}"
    for round_ in rounds:
        yield f"round {round_.round}: plan {_short(round_.plan)}, adapter {_short(round_.before)} to {round_.after}"
        yield from columns([(f"  {u.device}", f"weight {u.weight}", u.digest) for u in round_.updates])


def _shown(link: audit.Link) -> ShownEntry:
    try:
        entry = audit.decode_entry(link.text)
    except AuditEntryError as error:
        raise AuditEntryError(f"audit log: entry {link.number}: {error}; see `emberlora cloud audit verify`") from error
    return ShownEntry(link.number, link.time_ms / 1000, entry, link.previous, link.digest)


def _cells(shown: ShownEntry) -> Iterator[str]:
    yield str(shown.number)
    yield time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(shown.time))
    yield str(shown.entry.__struct_config__.tag)
    fields = msgspec.structs.asdict(shown.entry).items()
    yield ", ".join(_field(name, value) for name, value in fields)


def _field(name: str, value: object) -> str:
    if isinstance(value, int) and name.endswith("_milli"):
        name, value = name.removesuffix("_milli"), f"{value / 1000:g}"
    return f"{name.replace('_', ' ')} {_short(value)}"


def _short(value: object) -> str:
    """A field for people: of a digest or key the beginning."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text[:12] if len(text) == 64 else text
