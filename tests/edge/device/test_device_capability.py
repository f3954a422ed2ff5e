"""What a device measures of itself: told after enrolment and when it is news, and never a reason to stay out."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from device_bench import Bench, FakeTrainer
from msgspec import UNSET

from edge_runtime.device.capability import SelfReport, is_news, machine, tell_first
from edge_runtime.device.enrolment import leave
from edge_runtime.device.host import Host
from edge_runtime.device.records import Measured
from edge_runtime.device.transport import Pace, Traffic
from edge_runtime.training.job import Done, Event, Stepped, TrainingJob
from edge_runtime.wire import Capability

PI = Capability("aarch64", 4, 3906, 3000, 0.25)


def test_the_machine_as_the_system_describes_it(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  4000000 kB\nMemAvailable:  20480 kB\n")
    found = machine(0.25, meminfo=meminfo)
    assert (found.machine, found.available_mb, found.calibration_s) == (platform.machine(), 20, 0.25)
    assert found.memory_mb == (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) >> 20
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    meminfo.write_text("MemAvailable:  99999999999 kB\n")  # of the host, in a container that has less
    assert machine(meminfo=meminfo).available_mb == found.memory_mb
    unknown = machine(meminfo=tmp_path / "none")
    assert (unknown.available_mb, unknown.calibration_s) == (found.memory_mb // 4, UNSET)


@pytest.mark.parametrize(
    ("change", "news"),
    [
        ({}, False),
        ({"available_mb": 2401}, False),
        ({"available_mb": 2399}, True),
        ({"available_mb": 3751}, True),
        ({"calibration_s": 0.31}, False),
        ({"calibration_s": 0.32}, True),
        ({"step_s": 1.0}, True),
        ({"calibration_s": UNSET}, True),
        ({"machine": "armv7l"}, True),
        ({"cores": 2}, True),
    ],
)
def test_a_quarter_more_is_news(change: dict[str, object], news: bool) -> None:
    assert is_news(PI, msgspec.structs.replace(PI, **change)) is news


def test_small_bodies_say_nothing_of_a_link() -> None:
    pace = Pace()
    pace.add(65_535, 0.001)
    pace.add(1 << 20, 0.0)  # the clock was set back
    assert pace.bytes_s is None
    pace.add(100_000, 1.0)
    pace.add(300_000, 1.0)
    assert pace.bytes_s == 200_000
    traffic = Traffic()
    for seconds in (0.05, -1.0, 0.03, 0.04):
        traffic.answered(seconds)
    assert traffic.round_trip_s == 0.03


async def test_it_is_told_after_enrolment(bench: Bench) -> None:
    await tell_first(bench.home, 0.25, host=Host())
    (told,) = bench.aggregator.told
    assert (told.machine, told.calibration_s, told.step_s) == (platform.machine(), 0.25, UNSET)
    assert bench.home.measured() == Measured(told, told=True)


async def test_a_device_from_before_tells_when_it_runs_and_again_when_it_knows_more(bench: Bench) -> None:
    """Its home has no such file: it says what the system says first."""
    assert bench.home.measured() is None
    await bench.run()
    first, *later = bench.aggregator.told
    assert (first.calibration_s, first.step_s) == (UNSET, UNSET)
    assert first.round_trip_s is UNSET
    assert later  # the stand-in's files were fetched, so the round trip is known
    assert later[0].round_trip_s > 0


def test_a_step_is_the_median_between_the_ends_of_two(bench: Bench) -> None:
    report = SelfReport(bench.home, Still(), "docs", iter([0.0, 2.0, 4.0, 9.0, 100.0, 101.0]).__next__)
    for step in (1, 2, 3, 4, 1, 2):
        report.stepped(step)
    assert report._steps == [1.0]  # the second round's; its first step has waited for the data


class Still:
    """A connection on which nothing went yet."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.told: list[Capability] = []

    async def tell(self, task: str, capability: Capability) -> None:
        self.told.append(capability)


async def test_the_step_of_a_round_is_told_and_kept(bench: Bench) -> None:
    bench.home.save_measured(Measured(machine(0.25)))
    client, times = Still(), iter([0.0, 2.0, 4.0, 9.0])
    report = SelfReport(bench.home, client, "docs", times.__next__)
    await report.tell()
    await report.tell()
    assert [told.step_s for told in client.told] == [UNSET]  # the second time there was no news
    for step in (1, 2, 3, 4):
        report.stepped(step)
    client.traffic.pace_up.add(1_000_000, 4.0)
    await report.tell()
    assert (client.told[-1].step_s, client.told[-1].up_bytes_s, client.told[-1].calibration_s) == (2.0, 250_000, 0.25)
    later = Still()
    await SelfReport(bench.home, later, "docs", times.__next__).tell()
    assert later.told == []  # kept from one run to the next


class ThreeSteps(FakeTrainer):
    """Three optimizer steps a round."""

    async def train(self, job: TrainingJob, on_event: Callable[[Event], None]) -> Done:
        for step in (1, 2):
            on_event(Stepped(step, 3, 2.0))
        return await super().train(job, lambda event: on_event(msgspec.structs.replace(event, step=3, steps=3)))


async def test_the_steps_of_a_run_are_timed(bench: Bench) -> None:
    bench.trainer = ThreeSteps()
    await bench.run()
    assert bench.aggregator.told[-1].step_s > 0


async def test_an_aggregator_from_before_changes_nothing(bench: Bench) -> None:
    bench.aggregator.faults.no_capability = True
    await tell_first(bench.home, 0.25, host=Host())
    stored = bench.home.measured()
    assert stored is not None
    assert not stored.told
    await bench.run()
    assert bench.home.state().finished
    assert bench.aggregator.told == []


async def test_a_server_that_is_away_is_told_later(bench: Bench) -> None:
    bench.aggregator.faults.away = True
    await tell_first(bench.home, 0.25, host=Host())
    bench.aggregator.faults.away = False
    await bench.run()
    assert bench.aggregator.told[0].calibration_s == 0.25


async def test_leaving_forgets_it(bench: Bench) -> None:
    await tell_first(bench.home, 0.25, host=Host())
    await leave(bench.home, host=Host())
    assert bench.home.measured() is None
