"""From an adapter back to the sealed updates that made it. Pure; the caller has checked the audit log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from cloud.store import RoundRecord, UpdateRecord
from edge_runtime import wire


class TracedUpdate(msgspec.Struct, frozen=True):
    """What a device gave: ``digest`` is that of its sealed bytes, ``weight`` as counted."""

    device: str
    digest: str
    weight: int


class TracedRound(msgspec.Struct, frozen=True):
    """A round that moved the adapter ``before`` to the adapter ``after``, both digests; ``plan`` is its plan's."""

    round: int
    plan: str
    before: str
    after: str
    updates: tuple[TracedUpdate, ...]


def trace(
    records: Sequence[RoundRecord], plans: Sequence[wire.SignedPlan], updates: Iterable[UpdateRecord], adapter: str
) -> tuple[TracedRound, ...] | None:
    """The applied rounds that made an adapter, in order; None when no plan names it.

    Args:
        records: Every round of the task, in order.
        plans: Theirs.
        updates: The counted updates of all rounds, without those that were set aside.
        adapter: Digest, hex. Where several plans name it, the last counts, so that nothing which went in is left out.
    """
    named = [number for number, signed in enumerate(plans) if signed.plan.adapter == adapter]
    if not named:
        return None
    given: dict[int, list[TracedUpdate]] = {}
    for update in updates:
        receipt = update.receipt
        given.setdefault(receipt.round, []).append(TracedUpdate(receipt.device, receipt.digest, receipt.weight))
    pairs = list(zip(records, plans, strict=True))[: named[-1] + 1]
    return tuple(
        TracedRound(record.round, signed.digest, signed.plan.adapter, after.plan.adapter, tuple(given[record.round]))
        for (record, signed), (_, after) in pairwise(pairs)
        if record.state == "applied"
    )
