"""A device trains when its user's rules allow it, stops when they no longer do, and loses nothing by it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from click.testing import CliRunner
from device_bench import Bench, FakeTrainer

from edge_runtime.device import events, rules_command
from edge_runtime.device.conditions import conditions, hottest
from edge_runtime.device.eligibility import Conditions, Rules, obstacles, rest_left, unknown
from edge_runtime.device.records import Settings
from edge_runtime.training.job import Done, Event, TrainingJob

GOOD = Conditions(on_power=True, temperature_c=50.0, free_mb=8000)
ALL = Rules(on_power=True, max_temperature_c=70.0, min_free_mb=1000, rest_s=0.0)


def allow(bench: Bench, **rules: object) -> None:
    bench.home.save_settings(Settings(rules=msgspec.convert(rules, Rules)))


def rules_of(found: tuple[object, ...]) -> list[str]:
    return [obstacle.rule for obstacle in found]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("now", "held", "expected"),
    [
        (GOOD, False, []),
        (Conditions(), False, []),  # a system that tells nothing holds nobody up
        (Conditions(on_power=False, temperature_c=50.0, free_mb=8000), False, ["power"]),
        (Conditions(True, 70.0, 1000), False, []),
        (Conditions(True, 70.1, 999), False, ["temperature", "memory"]),
        (Conditions(True, 65.0, 1250), True, []),  # who was held needs some room
        (Conditions(True, 65.1, 1249), True, ["temperature", "memory"]),
    ],
)
def test_rules_against_what_is_the_case(now: Conditions, held: bool, expected: list[str]) -> None:
    assert rules_of(obstacles(ALL, now, held=held)) == expected
    assert obstacles(Rules(), now, held=held) == ()


def test_a_rest_is_never_longer_than_itself() -> None:
    """Neither over nor begun before its time, also where a clock was set back."""
    rules = Rules(rest_s=100.0)
    assert [rest_left(rules, counted_at=50.0, now=now) for now in (50.0, 149.0, 150.0, 1e9, -1e9)] == [
        100,
        1,
        0,
        0,
        100,
    ]
    assert rest_left(rules, counted_at=0.0, now=1e9) == 0
    assert rest_left(Rules(), counted_at=50.0, now=50.0) == 0


def test_what_the_system_does_not_tell_is_said() -> None:
    assert unknown(ALL, GOOD) == unknown(Rules(), Conditions()) == ()
    assert len(unknown(ALL, Conditions())) == 3
    assert "temperature has no effect" in unknown(ALL, Conditions(on_power=True, free_mb=1))[0]


def sensor(*values: float) -> list[SimpleNamespace]:
    return [SimpleNamespace(current=value) for value in values]


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ({}, None),
        ({"nvme": sensor(40.0)}, 40.0),
        ({"nvme": sensor(90.0), "coretemp": sensor(55.0, 61.5)}, 61.5),
        ({"cpu_thermal": sensor(48.3)}, 48.3),
        ({"k10temp": sensor(0.0), "iwlwifi_1": sensor(33.0)}, 33.0),
        ({"acpitz": sensor(-273.2)}, None),
    ],
)
def test_the_hottest_processor(readings: dict[str, list[SimpleNamespace]], expected: float | None) -> None:
    """Other parts count only where no sensor is a processor's; a sensor that reads nothing never does."""
    assert hottest(readings) == expected


def test_this_machine_tells_its_memory() -> None:
    now = conditions()
    assert now.free_mb is not None
    assert now.free_mb > 10
    assert now.on_power in (True, False, None)


@dataclass
class Weather:
    """Conditions that follow a list, the last one for ever."""

    coming: list[Conditions]
    asked: int = 0

    def __call__(self) -> Conditions:
        self.asked += 1
        return self.coming.pop(0) if len(self.coming) > 1 else self.coming[0]


async def test_a_device_waits_until_it_may(bench: Bench) -> None:
    """It says why once, trains nothing meanwhile, and then takes part in what is open then."""
    allow(bench, on_power=True, max_temperature_c=70)
    hot, battery = Conditions(True, 80.0, 8000), Conditions(False, 50.0, 8000)
    bench.conditions = Weather([battery, battery, hot, GOOD])
    bench.on_event = lambda event: asserted(not bench.trainer.calls) if isinstance(event, events.Ineligible) else None
    await bench.run(once=True)
    assert [rules_of(event.obstacles) for event in bench.of(events.Ineligible)] == [["power"], ["temperature"]]
    assert bench.slept.count(60.0) == 3
    assert bench.trainer.calls == [0]
    assert len(bench.of(events.Uploaded)) == 1


def asserted(condition: bool) -> None:
    assert condition


async def test_without_rules_nothing_is_measured(bench: Bench) -> None:
    weather = Weather([Conditions(False, 99.0, 1)])
    bench.conditions = weather
    await bench.run(once=True)
    assert weather.asked == 0
    assert len(bench.of(events.Uploaded)) == 1


async def test_what_the_system_does_not_tell_holds_nobody_up(bench: Bench) -> None:
    """The user is told, once."""
    allow(bench, max_temperature_c=70)
    bench.conditions = Conditions
    await bench.run()
    assert [event.text for event in bench.of(events.Noticed) if "no effect" in event.text] == [
        "the rule about temperature has no effect: this system does not tell it"
    ]
    assert len(bench.of(events.Uploaded)) == 2


async def test_a_device_rests_between_updates(bench: Bench) -> None:
    """From the one that counted; it asks for the plan anew when it is over, for the aggregator goes on without it."""
    allow(bench, rest_s=0.5)
    counted: list[float] = []

    def note(event: events.DeviceEvent) -> None:
        if isinstance(event, events.Uploaded):
            counted.append(bench.home.state().counted_at)

    bench.on_event = note
    await bench.run()
    assert [event.round for event in bench.of(events.Uploaded)] == [0, 1]
    (resting,) = bench.of(events.Ineligible)
    assert (resting.round, rules_of(resting.obstacles)) == (1, ["rest"])
    assert counted[1] - counted[0] >= 0.5
    assert min(counted) > 0
    assert all(seconds <= 0.5 for seconds in bench.slept if seconds not in (15.0, 1.0)), bench.slept


@dataclass
class SlowTrainer(FakeTrainer):
    """Its first training does not end by itself."""

    began: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: int = 0

    async def train(self, job: TrainingJob, on_event: Callable[[Event], None]) -> Done:
        if not self.began.is_set():
            self.began.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        return await super().train(job, on_event)


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        (Conditions(False, 50.0, 8000), "power"),
        (Conditions(True, 71.0, 8000), "temperature"),
        (Conditions(True, 50.0, 100), "memory"),
    ],
)
async def test_a_training_is_held_and_taken_up_again(bench: Bench, bad: Conditions, rule: str) -> None:
    """The child is ended, the user told; the round is trained when the rules are met again, and counts once."""
    allow(bench, on_power=True, max_temperature_c=70, min_free_mb=500)
    bench.trainer = trainer = SlowTrainer()
    weather = Weather([bad, bad, GOOD])
    bench.conditions = lambda: weather() if trainer.began.is_set() else GOOD
    await bench.run(once=True)
    (held,) = bench.of(events.Held)
    assert (held.round, rules_of(held.obstacles), trainer.cancelled) == (0, [rule], 1)
    assert held.retry_s in bench.slept
    assert 30 <= held.retry_s <= 60
    assert [rules_of(event.obstacles) for event in bench.of(events.Ineligible)] == [[rule]]
    assert trainer.calls == [0]
    assert len(bench.of(events.Uploaded)) == 1


async def test_a_checkpoint_survives_being_held(bench: Bench) -> None:
    """It is there when the next training begins, and gone when the round is over."""
    allow(bench, on_power=True)
    weather = Weather([Conditions(False), GOOD])
    bench.conditions = lambda: weather() if trainer.began.is_set() else GOOD
    found: list[bool] = []

    class Keeping(SlowTrainer):
        async def train(self, job: TrainingJob, on_event: Callable[[Event], None]) -> Done:
            assert job.checkpoint is not None
            found.append(Path(job.checkpoint).exists())
            Path(job.checkpoint).write_bytes(b"steps")
            return await super().train(job, on_event)

    bench.trainer = trainer = Keeping()
    await bench.run(once=True)
    assert found == [False, True]
    assert not bench.home.checkpoint.exists()


async def test_a_stop_ends_a_training_under_rules(bench: Bench) -> None:
    """Cancelling the device cancels what the gate watches."""
    allow(bench, on_power=True)
    bench.conditions = lambda: GOOD
    bench.trainer = trainer = SlowTrainer()
    running = asyncio.ensure_future(bench.run())
    await asyncio.wait_for(trainer.began.wait(), 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert trainer.cancelled == 1


async def test_few_examples_are_noticed_before_training(bench: Bench) -> None:
    """The round is left out, and no training is told of."""
    bench.aggregator.min_examples = bench.trainer.weight + 1
    bench.aggregator.plans.clear()
    bench.aggregator._open()
    await bench.run(once=True)
    assert [event.reason for event in bench.of(events.Skipped)] == ["few-examples"]
    assert not bench.of(events.TrainedRound)


def ask(bench: Bench, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(rules_command.rules, ["--home", str(bench.home.folder), *arguments])
    return done.exit_code, done.output


def test_rules_are_kept_shown_and_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is the case, and without touching what else the settings say."""
    monkeypatch.setattr(rules_command, "conditions", lambda: Conditions(False, 50.0, 8000))
    bench.home.save_settings(Settings(data=("a",)))
    code, text = ask(bench, "--on-power", "--max-temperature", "70", "--min-free-mb", "500", "--rest", "6h")
    assert code == 0
    assert "this device may not train now" in text
    assert [line.split()[0] for line in text.splitlines()] == ["power", "temperature", "memory", "rest", "this"]
    assert bench.home.settings() == Settings(
        data=("a",), rules=Rules(on_power=True, max_temperature_c=70.0, min_free_mb=500, rest_s=21600.0)
    )
    ask(bench, "--on-battery-too", "--max-temperature", "off", "--rest", "off")
    assert bench.home.settings().rules == Rules(min_free_mb=500)
    code, text = ask(bench, "--json")
    found = json.loads(text)
    assert (code, found["may_train"], found["obstacles"], found["free_mb"]) == (0, True, [], 8000)
    ask(bench, "--min-free-mb", "off")
    assert bench.home.settings().rules == Rules()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--max-temperature", "hot"), "expected a number above 0, or off; got 'hot'"),
        (("--max-temperature", "nan"), "expected a number above 0, or off"),
        (("--min-free-mb", "-5"), "expected a number above 0, or off"),
        (("--rest", "6"), "expected a number with s, m, h or d"),
    ],
)
def test_bad_rules_are_one_line(bench: Bench, arguments: tuple[str, ...], said: str) -> None:
    code, text = ask(bench, *arguments)
    assert code == 2
    assert said in text
    assert bench.home.settings().rules == Rules()
