"""``emberlora cloud pilot``: limits of grades and reasons on made records, and a real pilot on a real aggregator."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from click.testing import CliRunner, Result
from cloud_fleet import START, Device, Site, make_bundle, values_for

from cloud.budgeting import with_budget
from cloud.commands import cloud
from cloud.config import parse_config
from cloud.errors import ConfigError
from cloud.pilot import DeviceFinding, Findings, Grades, Reason, Shares, Trial, Wish, grade_device, judge
from cloud.pilot.devices import percentile
from cloud.pilot.grades import LIMITS, grade
from cloud.pilot.suggesting import affordable_bytes
from cloud.pilot.trial import TrialRound, read_trial
from cloud.planning import check_fit
from cloud.store import UpdateRecord
from edge_runtime import wire
from edge_runtime.bundle import Slot
from edge_runtime.wire import resources

WIDE = (Slot("q", 3000, 2000), Slot("v", 2500, 2000))  # so that updates are large enough to time a link by
MB = 1_000_000
NOTHING = Wish()


# -- grades ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_belongs_to_the_better_letter(name: str) -> None:
    best, good = LIMITS[name]
    letters = [grade(share, LIMITS[name]) for share in (0.0, best, best + 1e-9, good, good + 1e-9, None)]
    assert letters == ["A", "A", "B", "B", "C", "–"]


def test_a_device_has_the_worst_of_its_letters() -> None:
    good = Shares(memory=0.5, time=0.2, link=0.01, refused=0.0)
    assert grade_device(good, counted=3) == Grades("A", "A", "A", "A", "A")
    for name in LIMITS:
        poor = msgspec.structs.replace(good, **{name: 9.0})
        assert grade_device(poor, counted=3).overall == "C"
    assert grade_device(msgspec.structs.replace(good, link=0.2, memory=None), counted=1).overall == "B"
    assert grade_device(good, counted=0).overall == "C"
    assert grade_device(Shares(None, None, None, None), counted=1).overall == "–"


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([], 0.9) is None
    assert percentile([5.0], 0.9) == 5
    assert [percentile(range(1, 11), part) for part in (0.0, 0.1, 0.5, 0.9, 0.91, 1.0)] == [1, 1, 5, 9, 10, 10]


# -- made records ------------------------------------------------------------------------------------------------------


class Maker:
    """A trial of two devices and two rounds in which all is well; tests spoil what they are about."""

    def __init__(self, folder: Path) -> None:
        self.site = Site.make(folder, bundle=make_bundle(folder / "bundle", r_max=8, slots=WIDE), rounds=2)
        self.names = ["one", "two"]
        self.metrics: dict[str, Any] = {"steps": 10, "seconds": 20.0, "peak_private_mb": 500.0}
        self.capability = wire.Capability(
            "aarch64", 4, 4000, 2000, step_s=1.5, up_bytes_s=float(MB), down_bytes_s=2.0 * MB, round_trip_s=0.05
        )
        self.late_s = 0.0  # of the second round's deadline
        self.accuracy: Sequence[float | None] = (0.5, 0.6)
        self.losses: Sequence[float | None] = (2.0, 1.0)
        self.arrival_s: float | None = None
        self.answer_s = 30.0
        self.refusals: dict[str, dict[str, int]] = {}
        self.bytes = 200_000

    def trial(self, **task: Any) -> Trial:
        config = msgspec.structs.replace(self.site.config, task=msgspec.structs.replace(self.site.config.task, **task))
        updates = [
            UpdateRecord(
                wire.UpdateReceipt(name, round_, "ab" * 32, 100),
                self.bytes,
                START + 100 * round_ + self.answer_s,
                wire.LocalMetrics(**self.metrics),
            )
            for round_ in (0, 1)
            for name in self.names
        ]
        return Trial(
            config=config,
            manifest=self.site.bundle.manifest,
            bundle_bytes=10 * MB,
            rounds=[self._round(0, 0.0), self._round(1, self.late_s)],
            history=[self._status(round_) for round_ in (0, 1)],
            devices=[self._device(name) for name in self.names],
            updates=updates,
            arrivals={} if self.arrival_s is None else {(r, n): self.arrival_s for r in (0, 1) for n in self.names},
            refusals=self.refusals,
        )

    def _round(self, round_: int, late_s: float) -> TrialRound:
        training = wire.Training(batch_size=10, max_tokens=64, lr_a=1.0, lr_b=1.0, lr_head=1.0, epochs=1)
        plan = wire.Plan(
            schema=1,
            task="tiny",
            round=round_,
            rounds=2,
            state="train",
            bundle="0" * 64,
            adapter="0" * 64,
            adapter_bytes=0,
            modules=(),
            head_alive=True,
            training=training,
            update=wire.UpdateRules(),
            seed=0,
            deadline=START + 100 * round_ + 600,
            round_key="",
            min_examples=1,
        )
        return TrialRound(plan, START + 100 * round_, plan.deadline + late_s, applied=True)

    def _status(self, round_: int) -> wire.RoundStatus:
        return wire.RoundStatus(
            round_, 2, 200, self.losses[round_], None, self.accuracy[round_], 100, 2 * self.bytes, 30.0, "0" * 64
        )

    def _device(self, name: str) -> wire.DeviceStatus:
        return wire.DeviceStatus(
            name,
            START - 100,
            START,
            left=False,
            updates=2,
            bytes_up=2 * self.bytes,
            bytes_down=10 * MB + 2 * 300_000,
            capability=self.capability,
        )


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def reason(found: Findings, about: str) -> Reason:
    return next(reason for reason in found.reasons if reason.about == about)


def test_a_device_is_what_its_records_say(maker: Maker) -> None:
    found = judge(maker.trial(), NOTHING)
    one = found.devices[0]
    assert found.go
    assert (one.counted, one.refused, one.machine) == (2, 0, "aarch64, 4 cores")
    assert (one.up_bytes, one.down_bytes) == (200_000, 300_000)  # without the bundle
    assert (one.up_bytes_s, one.up_by, one.down_bytes_s) == (MB, "device", 2 * MB)
    assert one.transfer_s == pytest.approx(0.2 + 0.15)
    assert (one.train_s, one.step_s, one.examples, one.example_s) == (20, 1.5, 100, 0.2)
    assert (one.answer_s, one.peak_mb, one.available_mb) == (30, 500, 2000)
    assert one.shares == Shares(memory=0.25, time=30 / 600, link=pytest.approx(0.35 / 600), refused=0.0)
    assert one.grades.overall == "A"


def test_the_server_is_believed_before_the_device(maker: Maker) -> None:
    maker.arrival_s = 4.0
    one = judge(maker.trial(), NOTHING).devices[0]
    assert (one.up_bytes_s, one.up_by) == (50_000, "server")
    maker.bytes = 65_535  # comes out of buffers in one piece
    one = judge(maker.trial(), NOTHING).devices[0]
    assert (one.up_bytes_s, one.up_by) == (MB, "device")


def test_a_device_that_told_nothing_is_judged_by_what_is_known(maker: Maker) -> None:
    trial = maker.trial()
    silent = msgspec.structs.replace(trial.devices[0], capability=None)
    one = judge(replace(trial, devices=[silent, trial.devices[1]]), NOTHING).devices[0]
    assert (one.machine, one.up_bytes_s, one.up_by, one.available_mb, one.transfer_s) == (None,) * 5
    assert one.grades == Grades("–", "A", "–", "A", "A")


def test_the_first_answer_counts_only_where_there_is_no_other(maker: Maker) -> None:
    """For it the bundle was fetched."""
    trial = maker.trial()
    slow = [replace(u, received=u.received + 400) if u.receipt.round == 0 else u for u in trial.updates]
    assert judge(replace(trial, updates=slow), NOTHING).devices[0].answer_s == 30
    first = [update for update in slow if update.receipt.round == 0]
    assert judge(replace(trial, updates=first), NOTHING).devices[0].answer_s == 430


def test_one_device_or_one_round_is_no_pilot(maker: Maker) -> None:
    trial = maker.trial()
    one = [update for update in trial.updates if update.receipt.device == "one"]
    alone = judge(replace(trial, updates=one), NOTHING)
    assert (alone.go, reason(alone, "devices").passed) == (False, False)
    assert alone.devices[1].grades.overall == "C"
    short = judge(replace(trial, rounds=trial.rounds[:1]), NOTHING)
    assert (short.go, reason(short, "rounds").passed) == (False, False)


def test_a_deadline_that_moved_is_no_go(maker: Maker) -> None:
    assert reason(judge(maker.trial(), NOTHING), "deadlines").passed is True
    maker.late_s = 600.0
    found = judge(maker.trial(), NOTHING)
    assert (found.go, reason(found, "deadlines").passed) == (False, False)
    assert reason(found, "deadlines").figure.startswith("1 of 2 rounds")


@pytest.mark.parametrize(
    ("accuracy", "losses", "passed"),
    [
        ((0.5, 0.51), (None, None), True),
        ((0.5, 0.5), (2.0, 1.0), False),
        ((0.5, 0.4), (2.0, 1.0), False),
        ((None, 0.4), (2.0, 1.0), True),  # evaluated once: nothing to compare
        ((None, None), (1.0, 1.0), False),
        ((None, None), (None, 1.0), None),
    ],
)
def test_learning(
    maker: Maker, accuracy: tuple[float | None, ...], losses: tuple[float | None, ...], passed: bool | None
) -> None:
    maker.accuracy, maker.losses = accuracy, losses
    found = judge(maker.trial(), NOTHING)
    assert reason(found, "learning").passed is passed
    assert found.go is (passed is not False)


def test_a_language_model_learns_by_a_falling_loss(maker: Maker, tmp_path: Path) -> None:
    trial = replace(maker.trial(), manifest=make_bundle(tmp_path / "lm", task="lm").manifest)
    assert reason(judge(trial, NOTHING), "learning").passed is False  # 0.5 to 0.6
    falling = [msgspec.structs.replace(status, metric=-status.metric) for status in trial.history]
    assert reason(judge(replace(trial, history=falling), NOTHING), "learning").passed is True


@pytest.mark.parametrize(("peak", "passed"), [(1800.0, True), (1801.0, False), (None, None)])
def test_memory(maker: Maker, peak: float | None, passed: bool | None) -> None:
    maker.metrics["peak_private_mb"] = peak
    found = judge(maker.trial(), NOTHING)
    assert reason(found, "memory").passed is passed
    assert found.go is (passed is not False)


def test_refused_and_late_updates(maker: Maker) -> None:
    """Four were counted; more than a tenth of all is too many."""
    maker.refusals = {"one": {"round-closed": 1}}
    found = judge(maker.trial(), NOTHING)
    assert reason(found, "refusals").passed is False
    assert "1 of 5 updates were refused or too late (round-closed 1)" in reason(found, "refusals").figure
    assert found.devices[0].shares.refused == pytest.approx(1 / 3)
    trial = maker.trial()
    five = [replace(u, receipt=msgspec.structs.replace(u.receipt, round=r)) for u in trial.updates for r in (0, 1, 1)]
    assert len(five) == 12
    assert reason(judge(replace(trial, updates=five[:9]), NOTHING), "refusals").passed is True  # 1 of 10


# -- suggestions -------------------------------------------------------------------------------------------------------


def timed(name: str, bytes_s: float | None) -> DeviceFinding:
    fields = dict.fromkeys(DeviceFinding.__struct_fields__)
    fields |= {"name": name, "counted": 1, "refused": 0, "up_bytes_s": bytes_s, "down_bytes_s": bytes_s}
    return DeviceFinding(**fields)


def test_the_slowest_fifth_is_not_planned_for() -> None:
    fleet = [timed(str(number), 1000.0 * number) for number in range(1, 11)]
    assert affordable_bytes(fleet, 100) == 100 / 4 * 3000
    assert affordable_bytes(fleet[:4], 100) == 100 / 4 * 1000
    assert affordable_bytes([timed("one", None)], 100) is None
    assert affordable_bytes([timed("one", None), timed("two", 10.0)], 100) == 250


@pytest.mark.parametrize(
    ("devices", "per_round", "least"),
    [(1, 1, 1), (2, 2, 2), (3, 2, 2), (4, 3, 2), (5, 4, 2), (10, 8, 4), (200, 160, 80), (10_000, 2048, 1024)],
)
def test_rounds_do_not_wait_for_the_slowest(maker: Maker, devices: int, per_round: int, least: int) -> None:
    found = judge(maker.trial(), Wish(devices=devices)).suggestion
    assert (found.devices, found.devices_per_round, found.min_devices) == (devices, per_round, least)


def test_deadline_and_rounds(maker: Maker) -> None:
    found = judge(maker.trial(), NOTHING).suggestion
    assert (found.round_deadline_s, found.rounds, found.rounds_per_day) == (60, 12, 24)
    maker.answer_s = 95.0
    assert judge(maker.trial(), NOTHING).suggestion.round_deadline_s == 190
    assert judge(maker.trial(), Wish(examples=200)).suggestion.round_deadline_s == 230  # 20 s more, twice
    assert judge(maker.trial(rounds=40), NOTHING).suggestion.rounds == 40
    wished = judge(maker.trial(), Wish(rounds=7, round_s=7200, rounds_per_day=100)).suggestion
    assert (wished.rounds, wished.round_deadline_s, wished.rounds_per_day) == (7, 7200, 12)


def test_fast_links_need_no_budget(maker: Maker) -> None:
    found = judge(maker.trial(), Wish(rounds=12))
    assert found.suggestion.bytes_per_device_per_round is None
    assert (found.suggestion.policy, found.suggestion.upload) == ("fixed", "float32")
    assert "[annealing]" not in found.suggestion.toml
    assert found.month.device_up == 200_000 * 24 * 30
    assert found.month.server_down == 300_000 * 24 * 30 * 2


@pytest.mark.parametrize("policy", ["fixed", "anneal", "kill-revive", "lora-a2"])
def test_a_slow_link_gets_a_budget_that_the_aggregator_can_keep_to(maker: Maker, policy: str) -> None:
    maker.capability = msgspec.structs.replace(maker.capability, up_bytes_s=20_000.0, down_bytes_s=30_000.0)
    found = judge(maker.trial(policy=policy), NOTHING)
    suggestion = found.suggestion
    assert found.go
    budget = suggestion.bytes_per_device_per_round
    assert budget is not None
    assert suggestion.least_bytes <= budget <= suggestion.affordable_bytes
    # 200 kB up and 300 kB down of every 500 kB at these speeds, for 15 of 60 s
    assert suggestion.affordable_bytes == int(15 / (0.4 / 20_000 + 0.6 / 30_000))
    assert found.month.device_up == pytest.approx(0.4 * budget * 720)
    assert found.month.server_up == pytest.approx(0.4 * budget * 720 * 2)
    accepted(maker.site, suggestion.toml)


def test_links_that_cannot_bear_the_least_are_no_go(maker: Maker) -> None:
    maker.capability = msgspec.structs.replace(maker.capability, up_bytes_s=100.0, down_bytes_s=100.0)
    found = judge(maker.trial(), NOTHING)
    suggestion = found.suggestion
    assert (found.go, reason(found, "links").passed) == (False, False)
    assert suggestion.bytes_per_device_per_round == suggestion.least_bytes > (suggestion.affordable_bytes or 0)
    assert "more than the slowest useful link affords" in suggestion.note
    accepted(maker.site, suggestion.toml)


def test_annealing_that_does_not_fit_the_rounds_is_replaced(maker: Maker) -> None:
    """With policy fixed nobody had looked at it."""
    maker.capability = msgspec.structs.replace(maker.capability, up_bytes_s=20_000.0, down_bytes_s=30_000.0)
    trial = maker.trial()
    long = msgspec.structs.replace(trial.config.annealing, initiating_rounds=20)
    trial = replace(trial, config=msgspec.structs.replace(trial.config, annealing=long))
    suggestion = judge(trial, Wish(rounds=13)).suggestion
    assert "initiating_rounds = 0\n" in suggestion.toml
    accepted(maker.site, suggestion.toml)


def test_a_task_that_can_have_no_budget_is_held_against_what_it_moved(maker: Maker) -> None:
    """The server cannot know what modules move where devices keep B, so only policy fixed goes with that."""
    task = {"personal": ("B",), "aggregation": "a-only"}
    found = judge(maker.trial(**task), NOTHING)
    suggestion = found.suggestion
    assert found.go
    assert (suggestion.policy, suggestion.bytes_per_device_per_round, suggestion.least_bytes) == (
        "fixed",
        None,
        500_000,
    )
    assert "task.policy must be fixed" in suggestion.note
    maker.capability = msgspec.structs.replace(maker.capability, up_bytes_s=20_000.0, down_bytes_s=20_000.0)
    assert reason(judge(maker.trial(**task), NOTHING), "links").passed is False  # 300 kB in 15 s


def test_links_that_were_not_timed_are_not_guessed(maker: Maker) -> None:
    maker.capability = wire.Capability("aarch64", 4, 4000, 2000)
    found = judge(maker.trial(), NOTHING)
    assert reason(found, "links").passed is None
    assert found.suggestion.bytes_per_device_per_round is None
    assert found.suggestion.affordable_bytes is None


def test_the_least_is_the_least(maker: Maker) -> None:
    """A byte less is refused by the aggregator's own check."""
    maker.capability = msgspec.structs.replace(maker.capability, up_bytes_s=100.0, down_bytes_s=100.0)
    suggestion = judge(maker.trial(), NOTHING).suggestion
    less = suggestion.toml.replace(
        f"bytes_per_device_per_round = {suggestion.least_bytes}",
        f"bytes_per_device_per_round = {suggestion.least_bytes - 1}",
    )
    with pytest.raises(ConfigError, match=f"expected at least {suggestion.least_bytes}"):
        accepted(maker.site, less)


def accepted(site: Site, toml: str) -> None:
    """Paste the lines into a config, and settle it as the aggregator does."""
    text = toml.replace("[task]\n", '[task]\nname = "real"\nbundle = "../bundle"\n')
    config = parse_config(text.encode(), path=site.folder / "real.toml")
    check_fit(config, site.bundle)
    with_budget(config, site.bundle.manifest)


# -- a real pilot ------------------------------------------------------------------------------------------------------


async def send(site: Site, device: Device, signed: wire.SignedPlan, *, takes_s: float, **metrics: Any) -> None:
    """An update whose body is under way for so long by the server's clock."""
    values = values_for(site, signed, signed.plan.round)
    sealed = device.seal(signed, device.frame(signed, values, weight=40, **metrics))
    path = resources.update_path("tiny", signed.plan.round, device.name)

    async def body():
        yield sealed[:50]
        await asyncio.sleep(0.05)  # the head and the first bytes are there by then
        site.clock.now += takes_s
        yield sealed[50:]

    headers = device.head("PUT", path, sealed) | {"Content-Length": str(len(sealed))}
    async with device.session.put(site.server.url + path, data=body(), headers=headers) as response:
        assert response.status == 201, await response.read()


@pytest.fixture
async def piloted(tmp_path: Path, session: aiohttp.ClientSession) -> Site:
    """Three rounds with two devices, of which the second is slow; its server runs."""
    site = Site.make(
        tmp_path, bundle=make_bundle(tmp_path / "bundle", r_max=8, slots=WIDE), min_devices=2, round_deadline_s=600
    )
    await site.start()
    devices = [await site.device(session, name) for name in ("board", "laptop")]
    for device, (cores, free, down) in zip(devices, ((4, 1000, 1.0 * MB), (8, 8000, 9.0 * MB)), strict=True):
        told = wire.Capability("aarch64", cores, 16_000, free, step_s=0.5, down_bytes_s=down, round_trip_s=0.03)
        path = resources.capability_path("tiny", device.name)
        assert (await device.send("PUT", path, wire.encode_message(told))).status == 204
    board, laptop = devices
    for round_ in range(3):
        plans = [await device.plan(after=round_ - 1) for device in devices]
        for device, signed in zip(devices, plans, strict=True):
            await device.blob(signed.plan.adapter)
        site.clock.now += 30
        common = {"steps": 3, "eval_examples": 50, "eval_correct": 25 + 5 * round_, "loss_start": 2.0 - round_}
        await send(site, laptop, plans[1], takes_s=2, seconds=20.0, peak_private_mb=800.0, **common)
        await send(site, board, plans[0], takes_s=8, seconds=80.0, peak_private_mb=800.0, **common)
    assert (await board.plan(after=2)).plan.state == "finished"
    await site.server.aggregator.members.flush()  # as the keeper does twice a second
    yield site
    await site.close()


async def ask(site: Site, *options: str) -> Result:
    """In a thread: a command has an event loop of its own."""
    return await asyncio.to_thread(CliRunner().invoke, cloud, ["pilot", "--config", str(site.folder), *options])


async def test_a_real_pilot(piloted: Site) -> None:
    trial = await read_trial(piloted.config)
    found = judge(trial, Wish(devices=10))
    assert found.go, found.reasons
    board, laptop = found.devices
    size = trial.updates[0].bytes
    assert size > 64 << 10
    mean = sum(update.bytes for update in trial.updates) / len(trial.updates)
    assert (board.counted, laptop.counted, found.rounds) == (3, 3, 3)
    assert (board.up_bytes_s, board.up_by) == (pytest.approx(mean / 8), "server")
    assert laptop.up_bytes_s == pytest.approx(mean / 2)
    assert (board.shares.memory, laptop.shares.memory) == (0.8, 0.1)
    assert (board.answer_s, laptop.answer_s) == (40, 32)
    assert (board.grades.memory, laptop.grades.memory) == ("B", "A")
    assert (board.grades.overall, laptop.grades.overall) == ("B", "A")
    assert "accuracy went from 0.5000 to 0.7000" in reason(found, "learning").figure
    assert found.suggestion.round_deadline_s == 80
    assert found.suggestion.devices_per_round == 8
    accepted(piloted, found.suggestion.toml)


async def test_the_command_while_the_server_runs(piloted: Site, tmp_path: Path) -> None:
    page = tmp_path / "pilot.html"
    told = await ask(piloted, "--html", str(page))
    assert told.exit_code == 0, told.output
    assert told.stdout.startswith("tiny: GO, after 3 rounds with 2 devices\n")
    assert "\nboard " in told.stdout
    assert "round_deadline_s = 80\n" in told.stdout
    text = page.read_text()
    assert "board" in text
    assert 'src="http' not in text
    as_json = msgspec.convert(json.loads((await ask(piloted, "--json", "--devices", "10")).stdout), Findings)
    assert as_json == judge(await read_trial(piloted.config), Wish(devices=10))


async def test_a_pilot_that_has_not_run_is_no_go(site: Site, session: aiohttp.ClientSession) -> None:
    await site.device(session, "one")
    told = await ask(site)
    assert told.exit_code == 1
    assert told.stdout.startswith("tiny: NO-GO: devices, rounds, grades\n")
    assert told.stderr == ""


@pytest.mark.parametrize("options", [("--devices", "0"), ("--round-minutes", "0"), ("--examples", "many")])
async def test_bad_usage(site: Site, options: tuple[str, ...]) -> None:
    assert (await ask(site, *options)).exit_code == 2


async def test_a_folder_without_a_task_is_one_line(tmp_path: Path) -> None:
    told = await ask(Site.make(tmp_path))
    assert told.exit_code == 2
    assert "holds no rounds" in told.stderr
    assert len(told.stderr.splitlines()) == 1
