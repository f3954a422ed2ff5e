"""The round state machine: which update counts, when a round closes, when the task ends.

Pure: no clock, no disk, no HTTP. :func:`advance` takes a state and an event and returns the next state, or raises a
named refusal and changes nothing. The rules:

- Round r counts one update of each device. The identical update again changes nothing; another one is refused.
- It closes as soon as ``devices_per_round`` updates are counted, or at its deadline when at least ``min_devices`` are.
  With fewer the deadline moves on by ``round_deadline_s``; nothing that was counted is lost.
- A closed round takes no update. Once its mean is applied the next round opens, or after the last one the task is
  finished.
- Stopping finishes the task with the adapter the open round started from: updates counted in an open round are
  *discarded*, because a part of a round is no mean the plan promised. A round that is already closed is applied first.
- Plan rounds rise strictly: the plan that says "finished" has the round after the last one that was opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from edge_runtime.wire import RoundClosedError, TaskFinishedError, UpdateConflictError, UpdateReceipt, WireError

Phase = Literal["open", "closed", "finished"]


@dataclass(frozen=True)
class RoundRules:
    """When rounds close and how many there are."""

    rounds: int
    devices_per_round: int
    min_devices: int
    round_deadline_s: float


@dataclass(frozen=True)
class TaskState:
    """Where a task is. ``counted`` holds the receipts of the round by device."""

    rules: RoundRules
    round: int
    phase: Phase
    deadline: float  # Unix seconds; of the round that is open
    counted: Mapping[str, UpdateReceipt] = field(default_factory=dict)
    stopping: bool = False

    def counts(self, receipt: UpdateReceipt) -> bool:
        """Whether this update is the one of its device that counts in the round."""
        return self.counted.get(receipt.device) == receipt


@dataclass(frozen=True)
class UpdateArrived:
    """A checked update; ``receipt`` is what its device will be told if it counts."""

    receipt: UpdateReceipt


@dataclass(frozen=True)
class TimePassed:
    """It is ``now`` (Unix seconds)."""

    now: float


@dataclass(frozen=True)
class RoundApplied:
    """The closed round's mean has been applied at ``now``."""

    now: float


@dataclass(frozen=True)
class StopAsked:
    """The operator wants the task to end."""


Event = UpdateArrived | TimePassed | RoundApplied | StopAsked


def first_state(rules: RoundRules, *, now: float) -> TaskState:
    """Round 0, just opened."""
    return TaskState(rules=rules, round=0, phase="open", deadline=now + rules.round_deadline_s)


def resumed_state(
    rules: RoundRules, *, round_: int, deadline: float, counted: Mapping[str, UpdateReceipt]
) -> TaskState:
    """A round that was open when the server ended; one that was full by then is closed, and takes no other update."""
    phase: Phase = "closed" if len(counted) >= rules.devices_per_round else "open"
    return TaskState(rules=rules, round=round_, phase=phase, deadline=deadline, counted=counted)


def check_update(state: TaskState, *, device: str, round_: int, digest: str) -> UpdateReceipt | None:
    """Say before an update is read whether it could count.

    Args:
        state: Where the task is.
        device: The sender.
        round_: The round the update is for.
        digest: SHA-256 of its sealed bytes, hex.

    Returns:
        The first receipt if this very update is counted already, else None.

    Raises:
        UpdateConflictError: another update of the device is counted in this round.
        TaskFinishedError: the task has ended.
        RoundClosedError: the round is not the open one.
    """
    known = state.counted.get(device)
    if known is not None and known.round == round_:
        if known.digest == digest:
            return known
        raise UpdateConflictError(
            f"update of {device} for round {round_}: another one is counted already: expected {known.digest[:12]}, "
            f"got {digest[:12]}"
        )
    if state.phase == "finished":
        raise TaskFinishedError(f"update of {device} for round {round_}: the task has ended")
    if state.phase == "closed" or round_ != state.round:
        current = state.round + (state.phase == "closed")
        raise RoundClosedError(
            f"update of {device} for round {round_}: not open: expected an update for round {current}"
        )
    return None


def advance(state: TaskState, event: Event) -> TaskState:
    """The state after an event.

    Raises:
        UpdateConflictError, TaskFinishedError, RoundClosedError: see :func:`check_update`.
        ValueError: ``RoundApplied`` for a round that is not closed: a fault of the caller.
    """
    if isinstance(event, UpdateArrived):
        return _count(state, event.receipt)
    if isinstance(event, TimePassed):
        return _pass_time(state, event.now)
    if isinstance(event, RoundApplied):
        return _apply(state, event.now)
    return _stop(state)


def take(state: TaskState, receipts: Sequence[UpdateReceipt]) -> tuple[TaskState, list[bool | WireError]]:
    """The state after updates that came one after the other; of each, whether it is new or why it is refused."""
    found: list[bool | WireError] = []
    for receipt in receipts:
        try:
            later = advance(state, UpdateArrived(receipt))
        except WireError as error:
            found.append(error)
            continue
        found.append(later is not state)
        state = later
    return state, found


def _count(state: TaskState, receipt: UpdateReceipt) -> TaskState:
    if check_update(state, device=receipt.device, round_=receipt.round, digest=receipt.digest) is not None:
        return state
    counted = {**state.counted, receipt.device: receipt}
    full = len(counted) >= state.rules.devices_per_round
    return replace(state, counted=counted, phase="closed" if full else "open")


def _pass_time(state: TaskState, now: float) -> TaskState:
    if state.phase != "open":
        return state
    if now < state.deadline:
        return state
    if len(state.counted) >= state.rules.min_devices:
        return replace(state, phase="closed")
    missed = int((now - state.deadline) // state.rules.round_deadline_s) + 1
    return replace(state, deadline=state.deadline + missed * state.rules.round_deadline_s)


def _apply(state: TaskState, now: float) -> TaskState:
    if state.phase != "closed":
        raise ValueError(f"round {state.round}: applied: expected a closed round, got {state.phase}")
    last = state.stopping or state.round + 1 >= state.rules.rounds
    return TaskState(
        rules=state.rules,
        round=state.round + 1,
        phase="finished" if last else "open",
        deadline=now if last else now + state.rules.round_deadline_s,
    )


def _stop(state: TaskState) -> TaskState:
    if state.phase == "finished":
        return state
    if state.phase == "closed":
        return replace(state, stopping=True)
    return TaskState(rules=state.rules, round=state.round + 1, phase="finished", deadline=state.deadline)
