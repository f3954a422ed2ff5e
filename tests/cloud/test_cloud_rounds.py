"""The round state machine: every refusal by name, and its rules under random events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.rounds import (
    RoundApplied,
    RoundRules,
    StopAsked,
    TaskState,
    TimePassed,
    UpdateArrived,
    advance,
    check_update,
    first_state,
    resumed_state,
)
from edge_runtime.wire import RoundClosedError, RoundError, TaskFinishedError, UpdateConflictError, UpdateReceipt

RULES = RoundRules(rounds=2, devices_per_round=3, min_devices=2, round_deadline_s=100.0)


def update(device: str, *, round_: int = 0, digest: str | None = None) -> UpdateArrived:
    return UpdateArrived(UpdateReceipt(device, round_, digest or f"digest-{device}", 1))


def after(*events: object, state: TaskState | None = None) -> TaskState:
    state = state or first_state(RULES, now=0.0)
    for event in events:
        state = advance(state, event)  # type: ignore[arg-type]
    return state


def test_full_round_closes_at_once() -> None:
    state = after(update("a"), update("b"))
    assert state.phase == "open"
    assert after(update("c"), state=state).phase == "closed"


def test_identical_update_changes_nothing() -> None:
    state = after(update("a"))
    assert after(update("a"), state=state) is state
    assert check_update(state, device="a", round_=0, digest="digest-a") == state.counted["a"]


def test_other_update_conflicts() -> None:
    state = after(update("a"))
    with pytest.raises(UpdateConflictError, match="update of a for round 0: another one is counted already"):
        after(update("a", digest="other"), state=state)
    closed = after(update("a"), update("b"), update("c"))
    with pytest.raises(UpdateConflictError):
        after(update("a", digest="other"), state=closed)


def test_identical_update_is_answered_while_the_round_is_applied() -> None:
    closed = after(update("a"), update("b"), update("c"))
    assert after(update("a"), state=closed) is closed


@pytest.mark.parametrize("round_", [1, 7])
def test_update_for_another_round_is_refused(round_: int) -> None:
    with pytest.raises(RoundClosedError, match="expected an update for round 0"):
        after(update("a", round_=round_))


def test_closed_round_takes_none() -> None:
    closed = after(update("a"), update("b"), update("c"))
    with pytest.raises(RoundClosedError, match="expected an update for round 1"):
        after(update("d"), state=closed)


def test_finished_task_takes_none() -> None:
    with pytest.raises(TaskFinishedError):
        after(StopAsked(), update("a"))


def test_deadline_closes_with_enough_and_moves_without() -> None:
    assert after(update("a"), update("b"), TimePassed(99.9)).phase == "open"
    assert after(update("a"), update("b"), TimePassed(100.0)).phase == "closed"
    late = after(update("a"), TimePassed(100.0))
    assert (late.phase, late.deadline, set(late.counted)) == ("open", 200.0, {"a"})
    assert after(TimePassed(1234.0)).deadline == 1300.0


def test_rounds_follow_until_the_last() -> None:
    full = (update("a"), update("b"), update("c"))
    second = after(*full, RoundApplied(50.0))
    assert (second.round, second.phase, second.deadline, second.counted) == (1, "open", 150.0, {})
    full = tuple(update(name, round_=1) for name in "abc")
    last = after(*full, RoundApplied(90.0), state=second)
    assert (last.round, last.phase) == (2, "finished")


def test_apply_of_an_open_round_is_a_fault() -> None:
    with pytest.raises(ValueError, match="expected a closed round"):
        after(RoundApplied(0.0))


def test_stop_discards_an_open_round_and_lets_a_closed_one_finish() -> None:
    stopped = after(update("a"), StopAsked())
    assert (stopped.round, stopped.phase, stopped.counted) == (1, "finished", {})
    assert after(StopAsked(), state=stopped) is stopped
    closed = after(update("a"), update("b"), update("c"), StopAsked())
    assert closed.phase == "closed"
    assert after(RoundApplied(1.0), state=closed).phase == "finished"


def test_a_round_that_was_full_before_a_restart_takes_no_other_update() -> None:
    counted = {name: update(name).receipt for name in "abc"}
    full = resumed_state(RULES, round_=0, deadline=9.0, counted=counted)
    with pytest.raises(RoundClosedError, match="expected an update for round 1"):
        after(update("d"), state=full)
    assert after(update("a"), state=full) is full
    assert after(TimePassed(0.0), RoundApplied(1.0), state=full).round == 1
    two = {name: counted[name] for name in "ab"}
    assert after(update("c"), state=resumed_state(RULES, round_=0, deadline=9.0, counted=two)) == full


EVENTS = st.one_of(
    st.builds(update, st.sampled_from("abcd"), round_=st.integers(0, 2), digest=st.sampled_from(["x", "y"])),
    st.builds(TimePassed, st.floats(0, 1e4)),
    st.builds(RoundApplied, st.floats(0, 1e4)),
    st.just(StopAsked()),
)


@given(st.lists(EVENTS, max_size=40))
def test_rules_hold_whatever_happens(events: list[object]) -> None:
    """Rounds never fall; a receipt never changes; a refused event changes nothing; a finished task stays finished."""
    state = first_state(RULES, now=0.0)
    for event in events:
        try:
            new = advance(state, event)  # type: ignore[arg-type]
        except (RoundError, ValueError):
            continue
        assert new.round >= state.round
        assert len(new.counted) <= RULES.devices_per_round
        if new.round == state.round:
            assert new.deadline >= state.deadline
            assert all(new.counted[device] is receipt for device, receipt in state.counted.items())
        else:
            assert new.round == state.round + 1
            assert not new.counted
        if state.phase == "finished":
            assert new is state
        state = new
