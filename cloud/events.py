"""What happens on the aggregator, as values: shown by the console, printed as JSON lines with ``--json``."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from edge_runtime.wire import RoundStatus


class _Event(msgspec.Struct, frozen=True, tag_field="event", rename={"round_": "round"}):
    pass


class ServerStarted(_Event, frozen=True, tag="server-started"):
    """The server listens at ``url``; the task is in this round."""

    url: str
    task: str
    state: str
    round_: int
    received: int


class DatabaseMigrated(_Event, frozen=True, tag="database-migrated"):
    """Tables of an older version are those of this one now."""

    found: int
    schema: int


class DeviceEnrolled(_Event, frozen=True, tag="device-enrolled"):
    """A device became known."""

    device: str


class DeviceRekeyed(_Event, frozen=True, tag="device-rekeyed"):
    """A device replaced its key."""

    device: str


class DeviceLeft(_Event, frozen=True, tag="device-left"):
    """A device left or was sent away."""

    device: str


class DeviceRevoked(_Event, frozen=True, tag="device-revoked"):
    """The operator refuses a device for good."""

    device: str


class PlanKeyChanged(_Event, frozen=True, tag="plan-key-changed"):
    """The operator had a new plan key made; plans are signed with it from this round on."""

    plan_key: str
    round_: int


class UpdateCounted(_Event, frozen=True, tag="update-counted"):
    """An update counts; ``received`` of ``wanted`` are there now."""

    round_: int
    device: str
    received: int
    wanted: int
    weight: int
    bytes: int
    loss_start: float | None
    loss_end: float | None


class RequestRefused(_Event, frozen=True, tag="request-refused"):
    """A request was answered with a problem."""

    method: str
    path: str
    problem: str
    detail: str


class DeadlineMoved(_Event, frozen=True, tag="deadline-moved"):
    """Too few updates were there at the deadline."""

    round_: int
    received: int
    min_devices: int
    deadline: float


class RoundApplied(_Event, frozen=True, tag="round-applied"):
    """A round's mean was applied."""

    status: RoundStatus
    rounds: int


class TaskFinished(_Event, frozen=True, tag="task-finished"):
    """The last adapter is published; updates of an open round may have been discarded by a stop."""

    rounds_applied: int
    discarded: int
    adapter: str
    published: str


class WorkFailed(_Event, frozen=True, tag="work-failed"):
    """Something on the server's side went wrong; it is tried again."""

    what: str
    detail: str


Event = (
    ServerStarted
    | DatabaseMigrated
    | DeviceEnrolled
    | DeviceRekeyed
    | DeviceLeft
    | DeviceRevoked
    | PlanKeyChanged
    | UpdateCounted
    | RequestRefused
    | DeadlineMoved
    | RoundApplied
    | TaskFinished
    | WorkFailed
)
Report = Callable[[Event], None]
