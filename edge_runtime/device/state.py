"""What a device does next: pure decisions, no clock, disk or socket.

The device distrusts its server: a plan changes the state only through :func:`accept`, which refuses by name what is
not signed, older than one seen, for another task, or over the device's own floors.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_runtime.device.floors import Floors, check_floors
from edge_runtime.device.records import DeviceState, Pending
from edge_runtime.wire import SignedPlan, check_order, open_plan


@dataclass(frozen=True)
class Upload:
    """Send an update that is not acknowledged yet; always first."""

    pending: Pending


@dataclass(frozen=True)
class Discard:
    """Drop an update of a round this device is done with: the crash came between the two writes."""

    pending: Pending


@dataclass(frozen=True)
class Poll:
    """Ask for the first plan of a round after ``after``."""

    after: int


@dataclass(frozen=True)
class Train:
    """Fetch what the plan names and train."""

    signed: SignedPlan


@dataclass(frozen=True)
class Publish:
    """Fetch the task's last adapter."""

    signed: SignedPlan


@dataclass(frozen=True)
class Stop:
    """The task is finished and its adapter is here."""


Action = Upload | Discard | Poll | Train | Publish | Stop


def decide(state: DeviceState, pending: Pending | None, signed: SignedPlan | None) -> Action:
    """The next action.

    Args:
        state: Where the device is.
        pending: The oldest unsent update.
        signed: The plan in hand, accepted into ``state``.
    """
    if pending is not None:
        return Discard(pending) if pending.round <= state.done_round else Upload(pending)
    if state.finished:
        return Stop()
    if signed is None or signed.plan.round <= state.done_round:
        return Poll(state.done_round)
    return Publish(signed) if signed.plan.state == "finished" else Train(signed)


def accept(
    state: DeviceState, data: bytes, *, key: Ed25519PublicKey, task: str, floors: Floors
) -> tuple[DeviceState, SignedPlan]:
    """Check a plan as it came from the network.

    Returns:
        The state that has seen it, and the plan.

    Raises:
        PlanSignatureError, PlanFormatError, PlanOrderError: see :mod:`edge_runtime.wire.plan`.
        FloorError: it asks for more than this device allows.
    """
    signed = open_plan(data, key)
    check_order(signed.plan, task=task, last_round=state.seen_round)
    check_floors(signed.plan, floors)
    return msgspec.structs.replace(state, seen_round=signed.plan.round, plan=signed.digest), signed


def done_with(state: DeviceState, round_: int, *, counted_at: float | None = None) -> DeviceState:
    """The state of a device that has nothing more to do for a round.

    Args:
        state: Where it is.
        round_: The round.
        counted_at: When its update was acknowledged, Unix seconds; None if none was.
    """
    state = msgspec.structs.replace(state, done_round=max(state.done_round, round_))
    if counted_at is None:
        return state
    return msgspec.structs.replace(state, counted=state.counted + 1, counted_at=counted_at)
