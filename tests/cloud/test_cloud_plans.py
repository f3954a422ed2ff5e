"""``emberlora cloud plans``: the log says what plans and evidence say, and bytes are those of real updates."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import aiohttp
import msgspec
import pytest
from click.testing import CliRunner, Result
from cloud_fleet import Site, make_bundle, values_for

from cloud.commands import cloud
from cloud.kept import read_kept
from cloud.planlog import ModuleLog, RoundLog, plan_log, share_of_movement
from cloud.planning import plan_layout, read_evidence
from cloud.plans_page import short_name
from edge_runtime import wire

ANNEALING = {"budget_end": 0.4, "initiating_rounds": 2, "final_rounds": 1}
HEADER_AND_TRAILER = 148  # docs/wire.md


async def ask(site: Site, *options: str) -> Result:
    """In a thread: a command has an event loop of its own."""
    return await asyncio.to_thread(CliRunner().invoke, cloud, ["plans", "--config", str(site.folder), *options])


async def run_task(site: Site, session: aiohttp.ClientSession) -> list[wire.SignedPlan]:
    """One device, random changes; the plans it was given."""
    await site.start()
    device = await site.device(session, "one")
    signed, seen = await device.plan(), []
    while signed is not None and signed.plan.state == "train":
        seen.append(signed)
        values = values_for(site, signed, signed.plan.round)
        if signed.plan.quantisation:
            values *= 0  # what every code can say
        sealed = device.seal(signed, device.frame(signed, values))
        assert (await device.put(signed, sealed)).status == 201
        signed = await device.plan(after=signed.plan.round)
    return seen


@pytest.mark.parametrize("upload", ["float32", "int4"])
async def test_the_log_is_what_plans_and_evidence_say(
    tmp_path: Path, session: aiohttp.ClientSession, upload: str
) -> None:
    site = Site.make(
        tmp_path,
        bundle=make_bundle(tmp_path / "bundle", r_max=3),
        policy="annealed-kill-revive",
        rounds=8,
        devices_per_round=1,
        upload=upload,
        head="frozen",
        annealing=ANNEALING,
    )
    plans = await run_task(site, session)
    kept = await read_kept(site.config)
    log = plan_log(site.config, kept)
    await site.close()
    assert [round_.round for round_ in log] == list(range(8))
    for round_, signed, after in zip(log, plans, kept.records[1:], strict=True):
        assert [(m.name, m.rank, m.alive) for m in round_.modules] == [
            (m.name, m.rank, m.alive) for m in signed.plan.modules
        ]
        assert {m.name: m.moved for m in round_.modules} == read_evidence(after).moved
        assert round_.update_bytes == plan_layout(site.bundle, signed.plan).frame_bytes
        assert sum(m.bytes for m in round_.modules) + HEADER_AND_TRAILER == round_.update_bytes
        assert all((m.bytes > 0) == bool(m.alive) == (m.trained > 0) for m in round_.modules)
    assert any(not m.alive for round_ in log for m in round_.modules)
    temperatures = [round_.temperature for round_ in log]
    assert temperatures == sorted(temperatures, reverse=True)
    assert log[0].modules[0].score is None
    assert upload == "int4" or log[-1].modules[0].score is not None


async def test_a_budget_of_components_is_logged(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """With lora-a2 every round trains the end's share of all components and has no temperature."""
    bundle = make_bundle(tmp_path / "bundle", r_max=3)
    site = Site.make(
        tmp_path, bundle=bundle, policy="lora-a2", rounds=4, devices_per_round=1, annealing={"budget_end": 0.5}
    )
    await run_task(site, session)
    log = plan_log(site.config, await read_kept(site.config))
    await site.close()
    assert [(round_.temperature, round_.budget_share) for round_ in log] == [(None, 0.5)] * 4
    assert [sum(m.trained for m in round_.modules) for round_ in log] == [6] * 4


async def test_the_command_shows_rounds_modules_json_and_a_page(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    site = Site.make(
        tmp_path,
        bundle=make_bundle(tmp_path / "bundle", r_max=3),
        policy="annealed-kill-revive",
        rounds=5,
        devices_per_round=1,
        annealing=ANNEALING,
    )
    await run_task(site, session)
    page = tmp_path / "plans.html"
    told = await ask(site, "--html", str(page))
    assert told.exit_code == 0, told.output
    assert [line.split()[0] for line in told.stdout.splitlines()] == ["round", *"01234"]
    text = page.read_text()
    assert '"0 q"' in text
    assert '"1 v"' in text
    assert 'src="http' not in text
    names = [short_name(module) for module in msgspec.convert(_first(await ask(site, "--json")), RoundLog).modules]
    assert len(set(names)) == len(site.bundle.manifest.modules)  # one row each: equal names would fall together
    one = await ask(site, "--round", "1")
    assert len(one.stdout.splitlines()) == 1 + len(site.bundle.manifest.modules)
    as_json = [json.loads(line) for line in (await ask(site, "--json")).stdout.splitlines()]
    assert [round_["round"] for round_ in as_json] == [0, 1, 2, 3, 4]
    assert msgspec.convert(as_json[0], RoundLog).modules[0].rank == 3
    await site.close()


async def test_what_is_not_there_is_one_line(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    site = Site.make(tmp_path)
    nothing = await ask(site)
    assert nothing.exit_code == 2
    assert "holds no rounds" in nothing.stderr
    await site.start()
    unknown = await ask(site, "--round", "9")
    assert unknown.exit_code == nothing.exit_code
    assert "round 9: not among the rounds of this task, 0 to 0" in unknown.stderr
    assert len(unknown.stderr.splitlines()) == 1
    await site.close()


def _first(told: Result) -> object:
    return json.loads(told.stdout.splitlines()[0])


def test_few_modules_may_make_most_of_the_movement() -> None:
    def round_of(moved: list[float]) -> RoundLog:
        modules = tuple(ModuleLog(str(number), 0, "q", "B", 1, 1, None, size, 4) for number, size in enumerate(moved))
        return RoundLog(0, "train", None, None, 100, modules)

    assert share_of_movement(round_of([9.0, 0.5, 0.5, 0.0]), 0.9) == 0.25
    assert share_of_movement(round_of([1.0, 1.0, 1.0, 1.0]), 0.9) == 1.0
    assert share_of_movement(round_of([0.0, 0.0]), 0.9) is None
