"""Scenarios with a name: the bugs that random ones found, and what must never become one.

Each is a list of operations; afterwards everything is healed and every invariant of :mod:`tests.simulation.ledger` is
checked. What is asserted here is that the case is the one that it says it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from cloud import work
from cloud.aggregate import RoundSum
from cloud.outliers import Verdict
from cloud.service import Aggregator
from cloud.store import Database
from tests.simulation.ledger import BrokenError
from tests.simulation.ops import (
    Advance,
    CloseServer,
    Corrupt,
    Delay,
    DropRequest,
    DropResponse,
    FillDisk,
    Forge,
    Join,
    KillDevice,
    KillServer,
    Leave,
    MakeRoom,
    OldPlan,
    Op,
    Replay,
    RotatePlanKey,
    SetClock,
    StartDevice,
    StartServer,
    StopTask,
    Train,
    Upload,
    Work,
)
from tests.simulation.scenario import World, failure, run, shrink
from tests.simulation.server import Task

FLEET = (Join(1), Join(2))
ROUND = (*FLEET, Work(1), Work(2), Advance(1.0))


def outcomes(world: World) -> Counter[str]:
    """What the server decided on updates, by name; "" where it died before it did."""
    return Counter(delivery.outcome for delivery in world.ledger.deliveries)


# Found by random scenarios


def test_a_round_that_was_full_when_the_server_ended_takes_no_other_update(task: Task) -> None:
    """It was open for half a second after the restart: a third update got a row and no share of the sum, and the
    server could not be started again."""
    ops = (Join(1), Join(2), Join(3), Work(1), Work(2, then=0.01), CloseServer(), StartServer(then=0.0), Work(3))
    world = run(task, ops)
    assert len([row for row in world.ledger.rows if row.round == 0]) == 2


def test_refused_devices_come_back_where_too_few_are_left(task: Task) -> None:
    """Three of four were refused in the same round, and nobody was left who could have closed it."""
    bad = (Forge(1, "sealed"), Forge(2, "nan"), Forge(3, "weight"))
    fleet, work = ((*map(kind, range(4)),) for kind in (Join, Work))
    world = run(task, (*fleet, *bad, *work), seed=3)
    assert [row.device for row in world.ledger.rows if row.round == 0] != ["device-0"]


def test_a_part_that_came_before_a_server_was_killed_at_the_tasks_end_is_gone(task: Task) -> None:
    """The task was final, the part not yet tidied away, and no round followed in which it would have been."""
    part = (Join(1, True), KillServer("after append"), Work(1), Advance(0.1), StartServer(then=0.0))
    world = run(task, (*part, KillServer("after end_round"), StopTask(), StartServer()))
    assert not world.ledger.rows
    assert len(world.server.processes) >= 3


def test_a_disk_that_fills_up_as_the_database_is_closed(task: Task) -> None:
    """A fault of the simulation: it told the closed connection, which failed where nobody saw it, and the devices asked
    for ever for a server that never ended."""
    world = run(task, (*ROUND, FillDisk(None, "after dispose"), CloseServer(), MakeRoom(), StartServer()))
    assert len(world.ledger.rows) >= 2


@pytest.mark.parametrize("after", [(), ROUND])
def test_a_server_killed_before_it_has_destroyed_a_key_does_so_later(task: Task, after: tuple[Op, ...]) -> None:
    """The private key of a final round stayed in the write-ahead log until another round ended."""
    run(task, (*after, KillServer("sql PRAGMA wal_checkpoint"), StopTask(), StartServer()))


def test_a_round_is_final_when_its_key_cannot_be_destroyed_yet(task: Task) -> None:
    """On a full disk the write-ahead log could not be emptied, so the server took the round for closed and not applied:
    it tried to apply it twice a second, which the database refused, until somebody restarted it."""
    full = FillDisk(None, "sql PRAGMA wal_checkpoint")
    ops = (*FLEET, Work(1), full, Work(2), Advance(2.0), MakeRoom(), Advance(1.0))
    world = run(task, (*ops, Work(1), Work(2)))
    assert [one.state for one in world.ledger.rounds] == ["applied", "applied", "finished"]
    assert world.starts == 1


def test_what_a_full_disk_held_back_at_the_end_is_published_without_a_restart(task: Task) -> None:
    """Publishing was tried once after the last round."""
    ops = (*FLEET, Work(1), Work(2), Advance(1.0), Work(1), FillDisk(None, "after keep_only"), Work(2), Advance(2.0))
    world = run(task, (*ops, MakeRoom()))
    assert world.starts == 1


def test_what_is_tidied_late_is_not_what_the_next_round_has_counted(task: Task) -> None:
    """Tidying that a full disk had held back took the updates of the round that was open by then."""
    full = FillDisk(None, "sql PRAGMA wal_checkpoint")
    ops = (*FLEET, Work(1), full, Work(2), Advance(0.7), MakeRoom(then=0.0), Work(1, then=0.0), Advance(1.5))
    world = run(task, (*ops, KillServer(), StartServer(), Work(2), Advance(1.0)))
    assert len([row for row in world.ledger.rows if row.round == 1]) == 2


@pytest.mark.parametrize("at", ["replace", "unlink", "fsync"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_device_killed_while_it_keeps_an_update_leaves_none_behind(task: Task, at: str, nth: int) -> None:
    """Where the round ended meanwhile, the update stayed in its home for ever; not even sealed, if it came to that."""
    kill = KillDevice(3, at, nth)
    run(task, (*FLEET, Join(3), kill, Train(3), Work(1), Work(2), Upload(3), Advance(1.0), StartDevice(3)))


# What must never become one


def test_a_lost_answer_is_asked_for_again(task: Task) -> None:
    world = run(task, (*FLEET, DropResponse(1, "upload"), Work(1), Upload(1), Advance(3.0)))
    sent = [one.outcome for one in world.ledger.deliveries if (one.device, one.round) == ("device-1", 0)]
    assert sent[:2] == ["acknowledged", "acknowledged"]


@pytest.mark.parametrize("at", ["before add_updates", "after add_updates", "sql COMMIT", "fsync", "after _add_all"])
def test_a_server_killed_while_it_counts_counts_once(task: Task, at: str) -> None:
    ops = (*FLEET, KillServer(at), Work(1), StartServer(), Upload(1), Advance(3.0), Work(2), Advance(1.0))
    world = run(task, ops)
    assert world.starts == 2
    assert outcomes(world)[""] == 1


@pytest.mark.parametrize("nth", range(1, 8))
def test_a_device_killed_at_any_write_contributes_once(task: Task, nth: int) -> None:
    world = run(task, (*FLEET, KillDevice(1, "fsync", nth), Work(1), Advance(3.0), StartDevice(1), Work(1), Upload(1)))
    assert world.devices[1].home.folder.suffix == ".1"


WRITES = [
    (at, nth)
    for at, most in {"fsync": 6, "replace": 3, "sql COMMIT": 6, "unlink": 5}.items()
    for nth in range(1, most + 1)
]


@pytest.mark.parametrize(("at", "nth"), WRITES)
@pytest.mark.parametrize("again", [(), (RotatePlanKey(),)])
def test_a_server_killed_at_any_write_of_a_new_plan_key_goes_on(
    task: Task, at: str, nth: int, again: tuple[Op, ...]
) -> None:
    """From the request to the round after the one that is open; devices follow whatever key came of it."""
    change = (KillServer(at, nth), RotatePlanKey(), StartServer(), *again)
    world = run(task, (*FLEET, *change, Work(1), Work(2), Advance(1.0), StartServer(), Advance(2.0)))
    assert world.starts == 2
    assert world.server.aggregator is not None
    keys = len(world.server.aggregator.keyring.known.public)
    assert keys == 2 if again else keys in (1, 2)


@pytest.mark.parametrize(("at", "nth"), WRITES)
def test_a_server_killed_at_any_write_of_the_round_after_a_new_plan_key_goes_on(task: Task, at: str, nth: int) -> None:
    ops = (*FLEET, Work(1), RotatePlanKey(), KillServer(at, nth), Work(2), Advance(1.0), StartServer(), Advance(2.0))
    world = run(task, ops)
    assert world.starts == 2
    assert world.server.aggregator is not None
    assert len(world.server.aggregator.keyring.known.public) == 2


def test_replays_are_answered_and_change_nothing(task: Task) -> None:
    world = run(task, (*ROUND, Replay(1), Replay(2), Replay(2, 3), Replay(1, 1)))
    assert outcomes(world)["acknowledged"] >= 4
    assert outcomes(world)["unknown-device"] == 1


def test_another_device_cannot_take_an_update_for_its_own(task: Task) -> None:
    world = run(task, (*FLEET, Work(1), Replay(1, 2)))
    assert outcomes(world)["envelope"] == 1


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("nan", "update-value"),
        ("weight", "update-value"),
        ("plan", "update-plan"),
        ("short", "update-format"),
        ("sealed", "envelope"),
    ],
)
def test_a_bad_update_is_refused_by_name(task: Task, how: str, problem: str) -> None:
    world = run(task, (*FLEET, Forge(1, how), Work(1), Advance(1.0)))  # type: ignore[arg-type]
    assert outcomes(world)[problem] == 1


@pytest.mark.parametrize("part", ["plan", "patch", "blob", "upload", "tell"])
@pytest.mark.parametrize("fault", [Corrupt, DropRequest, DropResponse, Delay])
def test_any_exchange_may_fail(task: Task, part: str, fault: Callable[[int, str], Op]) -> None:
    """Device 0 downloads the bundle, too."""
    run(task, (fault(0, part), Join(0), Join(1), Work(0), Work(1), Advance(5.0), fault(0, part), Upload(0)))


def test_a_device_that_has_seen_a_round_obeys_no_older_plan(task: Task) -> None:
    world = run(task, (*FLEET, Work(1), OldPlan(1), Work(2), Advance(3.0)))
    assert not world.devices[1].weather.old_plan
    assert world.ledger.device_rounds[1] > 0


def test_a_device_that_comes_back_in_the_same_round_does_not_count_again(task: Task) -> None:
    world = run(task, (*FLEET, Work(1), Leave(1), Join(1), Work(1), Advance(1.0)))
    assert outcomes(world)["update-conflict"] == 1


def test_a_late_farewell_does_not_send_away_who_came_back(task: Task) -> None:
    """It was signed with the key of the device's first life."""
    run(task, (Join(1), Delay(1, "leave"), Leave(1), Leave(1), Join(1), Join(2), Advance(3.0), Work(1)))


@pytest.mark.parametrize("seconds", [-3600.0, 3600.0])
@pytest.mark.parametrize("device", [None, 1])
def test_a_clock_that_is_wrong_loses_nothing(task: Task, seconds: float, device: int | None) -> None:
    world = run(task, (*FLEET, Work(1), SetClock(seconds, device), Work(2), Advance(3.0)))
    assert [one.state for one in world.ledger.rounds] == ["applied", "applied", "finished"]


def test_a_stop_discards_the_open_round_by_name(task: Task) -> None:
    world = run(task, (*FLEET, Work(1), StopTask()))
    assert [one.state for one in world.ledger.rounds] == ["discarded", "finished"]


def test_a_full_disk_refuses_and_forgets(task: Task) -> None:
    world = run(task, (*FLEET, FillDisk(), Work(1), Advance(1.0), MakeRoom(), Upload(1), Advance(70.0)))
    assert outcomes(world)["DataFullError"] == 1


# Outliers: tasks of every fourth seed have a rule for them

ALL = (Join(0), Join(1), Join(2), Join(3))
WORKED = (Work(0), Work(1), Work(2), Work(3), Advance(1.0))


def aside(world: World) -> set[tuple[int, str]]:
    """Round and device of what was set aside."""
    assert world.ledger.aside is not None, "the operator was told"
    return set(world.ledger.aside)


@pytest.mark.parametrize("seed", [1, 5])
@pytest.mark.parametrize("how", ["large", "turned"])
def test_an_outlier_is_acknowledged_and_set_aside(task: Task, how: str, seed: int) -> None:
    world = run(task, (*ALL, Forge(1, how), *WORKED), seed=seed)  # type: ignore[arg-type]
    assert aside(world) == {(0, "device-1")}
    assert (0, "device-1") in {(row.round, row.device) for row in world.ledger.rows}


def test_of_two_outliers_the_larger_one_goes(task: Task) -> None:
    """One of four may go."""
    world = run(task, (*ALL, Forge(1, "turned"), Forge(2, "large"), *WORKED), seed=1)
    assert aside(world) == {(0, "device-2")}


def test_a_majority_has_its_way(task: Task) -> None:
    world = run(task, (*ALL, *(Forge(device, "turned") for device in (1, 2, 3)), *WORKED), seed=1)
    assert aside(world) == {(0, "device-0")}


@pytest.mark.parametrize(
    ("at", "nth"),
    [
        *((at, nth) for at, most in {"fsync": 8, "replace": 2, "sql COMMIT": 6}.items() for nth in range(1, most + 1)),
        ("before end_round", 1),
        ("after end_round", 1),
    ],
)
def test_a_server_killed_as_it_judges_gives_the_same_verdict(task: Task, at: str, nth: int) -> None:
    """From the last update of the round on."""
    kill = KillServer(at, nth)
    ops = (*ALL, Forge(2, "turned"), Work(0), Work(1), Work(2), kill, Work(3), Advance(1.0), StartServer(), Upload(3))
    world = run(task, (*ops, Advance(3.0)), seed=1)
    assert world.starts == 2
    assert aside(world) == {(0, "device-2")}


# The simulation itself


def test_the_same_list_and_seed_give_the_same_scenario(task: Task) -> None:
    ops = (*FLEET, KillServer("", 40), Work(1), StartServer(), Delay(2, "upload"), Work(2), Advance(3.0))
    first, second = (run(task, ops, seed=3) for _ in range(2))
    told = [[(one.device, one.round, one.outcome) for one in world.ledger.deliveries] for world in (first, second)]
    assert told[0] == told[1]
    assert first.server.clock() == second.server.clock()


def _twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RoundSum.add
    monkeypatch.setattr(RoundSum, "add", lambda self, update: (real(self, update), self._sums[0]._total.__imul__(2)))


def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Aggregator, "_sum_again", lambda self, work, updates: None)


def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Database, "add_updates", lambda self, update: None)


def _careless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Database, "destroy_keys", lambda self: None)


def _blind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "judge", lambda imprints, rule, *, least: Verdict(len(imprints)))


def _lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoundSum, "without", lambda self, updates: self)


KILLED = (*FLEET, Work(1), KillServer(), StartServer(), Work(2), Advance(1.0))


@pytest.mark.parametrize(
    ("fault", "ops", "broken"),
    [
        (_twice, ROUND, "9: "),
        (_forgetful, KILLED, "9: "),
        (_hasty, ROUND, "1: acknowledged and not in the database"),
        (_careless, ROUND, "12: the private key"),
        (_blind, (*ALL, Forge(1, "turned"), *WORKED), "15: "),
        (_lenient, (*ALL, Forge(1, "turned"), *WORKED), "9: "),
    ],
)
def test_a_fault_in_the_code_is_found(
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    ops: tuple[Op, ...],
    broken: str,
) -> None:
    seed = 1 if fault in (_blind, _lenient) else 0
    run(task, ops, seed=seed)
    fault(monkeypatch)
    with pytest.raises(BrokenError, match=broken):
        run(task, ops, seed=seed)


def test_a_failing_list_becomes_short(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all these, only the kill is needed: healing lets the devices go on, as it always does."""
    _forgetful(monkeypatch)
    noise = (Advance(0.3), Train(2), DropRequest(2, "tell"), Replay())
    short = shrink(task, (*noise, *KILLED, *noise), seed=0)
    assert failure(task, short, seed=0) is not None
    assert KillServer() in short
    assert len(short) <= 5


def test_a_part_that_comes_in_as_its_round_ends(task: Task) -> None:
    """Device 3 sends in parts; the round that one of them is for ends meanwhile. It was answered with a fault."""
    run(task, (Join(1, in_parts=True, then=0.0), Join(3, in_parts=True)), seed=43)
