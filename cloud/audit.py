"""The audit log: what its entries say, and the law of the chain they form. Pure: no clock, no disk.

Entry n is bound to all before it by its digest, SHA-256 over a prefix of our own, n, the time, the digest of entry
n - 1 and the entry's text, in this order; all but the text have fixed lengths, so no two entries have the same bytes.
``docs/audit.md`` is the format's page. A kind of entry never changes: what has to say more is a new kind.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from cloud.errors import AuditEntryError
from edge_runtime.wire import Outlier
from edge_runtime.wire.names import Hex32, Name

_CONTEXT = b"emberlora audit 1\0"
_FOUND_CONTEXT = b"emberlora audit found 1\0"
NOTHING = "00" * 32  # what entry 0 has in place of the digest before it
Count = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    pass


class LogBegun(_Entry, frozen=True, tag="log-begun"):
    """The task is new, and so is the log."""

    task: Name
    bundle: Hex32


class LogTakenUp(_Entry, frozen=True, tag="log-taken-up"):
    """The task is older than the log; ``found`` is :func:`found_digest` of the ``facts`` there were."""

    task: Name
    bundle: Hex32
    facts: Count
    found: Hex32


class TokenMade(_Entry, frozen=True, tag="token-made"):
    """The operator made a token; ``token`` is the SHA-256 of its 128-bit secret, ``expires`` Unix seconds."""

    device: Name
    token: Hex32
    expires: Count


class DeviceEnrolled(_Entry, frozen=True, tag="device-enrolled"):
    """A device used a token and brought the public key that its requests are signed with."""

    device: Name
    token: Hex32
    signing_key: Hex32


class DeviceRekeyed(_Entry, frozen=True, tag="device-rekeyed"):
    """A device replaced its public key, signing with the one it had."""

    device: Name
    signing_key: Hex32


class DeviceLeft(_Entry, frozen=True, tag="device-left"):
    """A device left; ``by`` says whether it did so itself or was sent away by the operator."""

    device: Name
    by: Name


class DeviceRevoked(_Entry, frozen=True, tag="device-revoked"):
    """The operator refuses a device from now on, and its public key under any name."""

    device: Name
    signing_key: Hex32


class PlanSigned(_Entry, frozen=True, tag="plan-signed"):
    """A round's plan by its digest, and the adapter that it names; ``finished`` says that nothing is trained in it."""

    round: Count
    plan: Hex32
    adapter: Hex32
    finished: bool


class PlanKeyChanged(_Entry, frozen=True, tag="plan-key-changed"):
    """The operator had a new key made; plans are signed with it from the next round on."""

    old: Hex32
    new: Hex32


class OperatorKeyChanged(_Entry, frozen=True, tag="operator-key-changed"):
    """Whoever has the server's disk replaced the key that the operator's requests are signed with."""

    old: Hex32
    new: Hex32


class UpdateCounted(_Entry, frozen=True, tag="update-counted"):
    """A contribution counts; ``digest`` is that of its sealed bytes, ``weight`` as counted."""

    round: Count
    device: Name
    digest: Hex32
    weight: Count


class UpdateRefused(_Entry, frozen=True, tag="update-refused"):
    """The first contribution of a device that was refused with this problem while ``round`` was open."""

    round: Count
    device: Name
    problem: str


class _Outlying(_Entry, frozen=True):
    """What is far from the others, by which rule; both figures in thousandths, so that they are whole numbers."""

    round: Count
    device: Name
    rule: Literal["norm", "direction"]
    measured_milli: int
    bound_milli: int
    devices: Count
    tier: Count


class OutlierSetAside(_Outlying, frozen=True, tag="outlier-set-aside"):
    """A counted contribution was taken out of its round's sum by the operator's rule; see :class:`wire.Outlier`."""


class OutlierKept(_Outlying, frozen=True, tag="outlier-kept"):
    """The rule would have set a contribution aside, but too few would have been left; it is in the sum."""


class RoundApplied(_Entry, frozen=True, tag="round-applied"):
    """The mean of a round was applied and made ``adapter``; devices and weight are those that are in it."""

    round: Count
    devices: Count
    weight: Count
    adapter: Hex32


class RoundDiscarded(_Entry, frozen=True, tag="round-discarded"):
    """The task was stopped while a round was open; its ``updates`` move nothing."""

    round: Count
    updates: Count


class StopAsked(_Entry, frozen=True, tag="stop-asked"):
    """The operator asked for the end of the task while ``round`` was open."""

    round: Count


Entry = (
    LogBegun
    | LogTakenUp
    | TokenMade
    | DeviceEnrolled
    | DeviceRekeyed
    | DeviceLeft
    | DeviceRevoked
    | PlanSigned
    | PlanKeyChanged
    | OperatorKeyChanged
    | UpdateCounted
    | UpdateRefused
    | OutlierSetAside
    | OutlierKept
    | RoundApplied
    | RoundDiscarded
    | StopAsked
)
KINDS = tuple(str(kind.__struct_config__.tag) for kind in Entry.__args__)
_DECODER: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)


def outlying(round_: int, outlier: Outlier) -> OutlierSetAside | OutlierKept:
    """The entry for an outlier."""
    kind = OutlierKept if outlier.kept else OutlierSetAside
    return kind(
        round=round_,
        device=outlier.device,
        rule=outlier.rule,
        measured_milli=round(outlier.measured * 1000),
        bound_milli=round(outlier.bound * 1000),
        devices=outlier.devices,
        tier=outlier.tier,
    )


def encode_entry(entry: Entry) -> str:
    """The one text of an entry: JSON without spaces, the kind first, then the fields as declared."""
    return msgspec.json.encode(entry).decode()


def decode_entry(text: str) -> Entry:
    """Read an entry strictly.

    Raises:
        AuditEntryError: it is none of this version, or not written as :func:`encode_entry` writes it.
    """
    try:
        entry = _DECODER.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise AuditEntryError(f"is no entry that this version knows: {error}") from error
    if encode_entry(entry) != text:
        raise AuditEntryError("is not written as entries are")
    return entry


@dataclass(frozen=True)
class Link:
    """An entry in its place. ``time_ms`` is Unix time in milliseconds, both digests SHA-256 in hex."""

    number: int
    time_ms: int
    previous: str
    digest: str
    text: str


def follow(last: Link | None, *, now: float, entry: Entry) -> Link:
    """The link that comes after ``last`` (None: the first), written at ``now`` (Unix seconds)."""
    number, previous = (0, NOTHING) if last is None else (last.number + 1, last.digest)
    time_ms, text = round(now * 1000), encode_entry(entry)
    return Link(number, time_ms, previous, link_digest(number, time_ms, previous, text), text)


def link_digest(number: int, time_ms: int, previous: str, text: str) -> str:
    """The digest of an entry, hex; see the top of this module.

    Raises:
        ValueError: ``number`` or ``time_ms`` is below 0, or ``previous`` is not hex.
    """
    if not 0 <= number < 2**64 or not 0 <= time_ms < 2**64:
        raise ValueError(f"entry {number}: number and time must be 64 bits without a sign")
    head = _CONTEXT + struct.pack("<QQ", number, time_ms) + bytes.fromhex(previous)
    return hashlib.sha256(head + text.encode()).hexdigest()


@dataclass(frozen=True)
class Broken:
    """The first entry at which a chain breaks, and how."""

    number: int
    how: str


def check_chain(links: Iterable[Link]) -> Broken | None:
    """Find the first entry that does not follow from those before it; None: all do.

    Whoever changes an entry and forges its digest too is found at the entry after it. What was cut off at the end, or
    changed there with a forged digest, no chain shows: a head that was noted earlier does.
    """
    last: Link | None = None
    for number, link in enumerate(links):
        how = _defect(number, last, link)
        if how is not None:
            return Broken(number, how)
        last = link
    if last is None:
        return Broken(0, "missing: the log is empty; a task from before logs gets one when it is served next")
    return None


def _defect(number: int, last: Link | None, link: Link) -> str | None:
    if link.number != number:
        return f"removed: the next entry has number {link.number}"
    follows = link.previous == (NOTHING if last is None else last.digest)
    if not _is_own(link):
        if follows:
            return "edited: its digest is not that of what it says"
        return "out of place: entries were reordered, removed or inserted here"
    if not follows and last is None:
        return "forged: the first entry follows another one"
    if not follows:
        return f"does not follow entry {number - 1}: that one was put there or edited, and its digest forged"
    try:
        first = isinstance(decode_entry(link.text), LogBegun | LogTakenUp)
    except AuditEntryError as error:
        return str(error)
    if first != (number == 0):
        return "forged: a log begins with its first entry, and only with it"
    return None


def _is_own(link: Link) -> bool:
    try:
        return link.digest == link_digest(link.number, link.time_ms, link.previous, link.text)
    except ValueError:  # a number or digest that is none
        return False


def task_fact(task: str, bundle: str) -> str:
    """What a store and entry 0 both say of the task, as a line."""
    return f"task {task}: bundle {bundle}"


def update_fact(round_: int, device: str, digest: str, weight: int) -> str:
    """The same of a counted update."""
    return f"update of {device} for round {round_}: {digest}, weight {weight}"


def revoked_fact(device: str, signing_key: str) -> str:
    """The same of a revocation; who deletes its row, so that the key counts again, is found."""
    return f"device {device}: revoked, key {signing_key}"


def plan_key_fact(old: str, new: str) -> str:
    """The same of a change of the plan key; who deletes its row, so that the old key counts again, is found."""
    return f"plan key {old}: followed by {new}"


def plan_fact(round_: int, digest: str) -> str:
    """The same of a signed plan."""
    return f"plan of round {round_}: {digest}"


def applied_fact(round_: int, adapter: str) -> str:
    """The same of an applied round."""
    return f"round {round_}: applied, adapter {adapter}"


def outlier_fact(round_: int, device: str, *, kept: bool) -> str:
    """The same of an outlier."""
    return f"update of {device} for round {round_}: {'an outlier, kept' if kept else 'set aside'}"


def discarded_fact(round_: int) -> str:
    """The same of a discarded round."""
    return f"round {round_}: discarded"


def fact_of(entry: Entry) -> str | None:
    """The line that the store must have, if the entry speaks of rows that never change."""
    if isinstance(entry, LogBegun | LogTakenUp):
        return task_fact(entry.task, entry.bundle)
    if isinstance(entry, UpdateCounted):
        return update_fact(entry.round, entry.device, entry.digest, entry.weight)
    if isinstance(entry, DeviceRevoked):
        return revoked_fact(entry.device, entry.signing_key)
    if isinstance(entry, PlanKeyChanged):
        return plan_key_fact(entry.old, entry.new)
    if isinstance(entry, PlanSigned):
        return plan_fact(entry.round, entry.plan)
    if isinstance(entry, RoundApplied):
        return applied_fact(entry.round, entry.adapter)
    if isinstance(entry, _Outlying):
        return outlier_fact(entry.round, entry.device, kept=isinstance(entry, OutlierKept))
    if isinstance(entry, RoundDiscarded):
        return discarded_fact(entry.round)
    return None


def found_digest(facts: Iterable[str]) -> str:
    """A digest of facts, whatever their order; no fact has a line break in it."""
    return hashlib.sha256(_FOUND_CONTEXT + "\n".join(sorted(facts)).encode()).hexdigest()


def check_facts(links: Sequence[Link], facts: Iterable[str]) -> Broken | None:
    """Compare a whole chain with what the store says; None: they agree.

    Every entry has its fact, and every fact its entry, except those from before the log, which entry 0 vouches for.
    """
    left = set(facts)
    for link in links:
        fact = fact_of(decode_entry(link.text))
        if fact is None:
            continue
        if fact not in left:
            return Broken(link.number, f"the store does not say so: {fact}")
        left.remove(fact)
    first = decode_entry(links[0].text)
    if isinstance(first, LogTakenUp):
        if found_digest(left) != first.found:
            return Broken(0, f"what the store held before the log, {first.facts} facts, is not as it was found")
    elif left:
        return Broken(links[-1].number, f"no entry up to this one says what the store does: {min(left)}")
    return None
