"""What is kept of a task that was run as a pilot: the records that findings are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cloud.config import Config
from cloud.kept import Kept, open_kept
from cloud.members import read_statuses
from cloud.store import UpdateRecord
from edge_runtime import wire
from edge_runtime.bundle import MANIFEST_NAME, Bundle, Manifest


@dataclass(frozen=True)
class TrialRound:
    """A round that was opened.

    Attributes:
        plan: As signed; its deadline is the one it began with.
        opened: Unix seconds.
        deadline: As it stands now, later than the plan's where too few updates had come by then.
        applied: Whether its mean was applied.
    """

    plan: wire.Plan
    opened: float
    deadline: float
    applied: bool


@dataclass(frozen=True)
class Trial:
    """A task so far.

    Attributes:
        config: With which it was run.
        manifest: Of its bundle.
        bundle_bytes: That a device fetches once.
        rounds: In order, without the finished state.
        history: What each applied round reported.
        devices: Every device that was enrolled, with what it measured of itself.
        updates: Every update that was counted.
        arrivals: Seconds its body took, by round and device, where that was measured.
        refusals: Updates that were refused, by device and name of the problem.
    """

    config: Config
    manifest: Manifest
    bundle_bytes: int
    rounds: Sequence[TrialRound]
    history: Sequence[wire.RoundStatus]
    devices: Sequence[wire.DeviceStatus]
    updates: Sequence[UpdateRecord]
    arrivals: Mapping[tuple[int, str], float]
    refusals: Mapping[str, Mapping[str, int]]


async def read_trial(config: Config) -> Trial:
    """Read a task from its data folder; its server may run.

    Raises:
        DataError, BundleError: see :func:`cloud.kept.open_kept`.
    """
    async with open_kept(config) as (database, kept):
        return Trial(
            config=config,
            manifest=kept.bundle.manifest,
            bundle_bytes=_bundle_bytes(kept.bundle),
            rounds=_rounds(kept),
            history=await database.call(database.history),
            devices=await read_statuses(database),
            updates=await database.call(database.updates),
            arrivals=await database.call(database.arrivals),
            refusals=await database.call(database.refusals),
        )


def _bundle_bytes(bundle: Bundle) -> int:
    files = sum(entry.bytes for entry in bundle.manifest.files.values())
    return files + bundle.path(MANIFEST_NAME).stat().st_size


def _rounds(kept: Kept) -> list[TrialRound]:
    plans = [(record, kept.keys.open(record.plan).plan) for record in kept.records]
    return [
        TrialRound(plan, record.opened, record.deadline, applied=record.state == "applied")
        for record, plan in plans
        if plan.state != "finished"
    ]
