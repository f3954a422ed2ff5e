"""Plans made again: equal to what was signed, unless config or evidence say otherwise."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from click.testing import CliRunner, Result
from cloud_fleet import Site, make_bundle, values_for

from cloud.commands import cloud
from edge_runtime.bundle import adapter_ranks, parse_tensors

ANNEALING = {"budget_end": 0.4, "initiating_rounds": 2, "final_rounds": 1}


async def replay(site: Site, *options: str) -> Result:
    """In a thread: a command has an event loop of its own."""
    arguments = ["replay", "--config", str(site.folder), *options]
    return await asyncio.to_thread(CliRunner().invoke, cloud, arguments)


async def run_task(site: Site, session: aiohttp.ClientSession) -> list[dict[str, int]]:
    """Let two devices send random changes in every round; the ranks of every adapter that was handed out."""
    await site.start()
    devices = [await site.device(session, name) for name in ("one", "two")]
    signed = await devices[0].plan()
    ranks = []
    while signed.plan.state == "train":
        adapter = parse_tensors((await devices[0].blob(signed.plan.adapter)).body, what="adapter")
        ranks.append(adapter_ranks(site.bundle.manifest, adapter))
        assert ranks[-1] == signed.plan.ranks
        for number, device in enumerate(devices):
            sealed = device.seal(signed, device.frame(signed, values_for(site, signed, signed.plan.round + number)))
            assert (await device.put(signed, sealed)).status == 201
        signed = await devices[0].plan(after=signed.plan.round)
    return ranks


async def test_an_annealed_task_is_replayed(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """Ranks fall, adapters follow, and the command finds every plan as signed; also after the server has gone."""
    bundle = make_bundle(tmp_path / "bundle", r_max=3)
    site = Site.make(tmp_path, bundle=bundle, policy="anneal", rounds=7, annealing=ANNEALING)
    ranks = await run_task(site, session)
    sizes = {name: sum(features) for name, features in bundle.manifest.features.items()}
    shares = [sum(sizes[n] * r for n, r in found.items()) / (3 * sum(sizes.values())) for found in ranks]
    assert shares[:2] == [1.0, 1.0]
    assert all(later <= earlier for earlier, later in pairwise(shares))
    assert shares[-1] <= 0.4
    for _ in range(2):
        found = await replay(site)
        assert found.exit_code == 0, found.output
        assert found.stdout.count("as signed") == 7
        await site.close()
    lines = [json.loads(line) for line in (await replay(site, "--json")).stdout.splitlines()]
    assert [line["round"] for line in lines] == list(range(7))
    assert lines[0]["parameters"] > lines[-2]["parameters"]


async def test_a_changed_config_shows(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """The rounds that differ are named, and the command fails."""
    site = Site.make(
        tmp_path, bundle=make_bundle(tmp_path / "bundle", r_max=3), policy="anneal", rounds=7, annealing=ANNEALING
    )
    await run_task(site, session)
    await site.close()
    path = site.folder / "emberlora.toml"
    path.write_text(path.read_text().replace("budget_end = 0.4", "budget_end = 0.9"))
    found = await replay(site)
    assert found.exit_code == 1
    assert "round 0: " in found.stdout
    assert "as signed" in found.stdout.splitlines()[0]
    assert "differs: layer." in found.stdout
    assert "signed rank" in found.stdout


async def test_nothing_to_replay_is_one_clear_line(tmp_path: Path) -> None:
    found = await replay(Site.make(tmp_path))
    assert found.exit_code == 2
    assert "holds no rounds: start the task" in found.stderr


async def test_a_cut_keeps_the_function_best(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """From the round before the first cut to the plan after it, every product B·A is its best approximation."""
    bundle = make_bundle(tmp_path / "bundle", r_max=3)
    site = Site.make(tmp_path, bundle=bundle, policy="anneal", rounds=7, annealing=ANNEALING | {"curve": "linear"})
    await site.start()
    one = await site.device(session, "one")
    site.clock.now += 1
    before = after = None
    signed = await one.plan()
    while signed.plan.state == "train":
        adapter = parse_tensors((await one.blob(signed.plan.adapter)).body, what="adapter")
        if before is not None and signed.plan.ranks != before[1]:
            after = adapter
            break
        change = values_for(site, signed, signed.plan.round)
        before = adapter, signed.plan.ranks, change, signed.plan
        await one.put(signed, one.seal(signed, one.frame(signed, change)))
        site.clock.now = signed.plan.deadline + 1
        await site.tick()
        signed = await one.plan(after=signed.plan.round)
    assert before is not None
    assert after is not None
    started, _, change, plan = before
    start = 0
    for module in plan.modules:
        name = f"{module.name}.lora_{module.alive.lower()}"
        size = started[name].size
        started[name] = started[name] + change[start : start + size].reshape(started[name].shape)
        start += size
    for module in signed.plan.modules:
        whole = started[f"{module.name}.lora_b"].astype(np.float64) @ started[f"{module.name}.lora_a"]
        kept = after[f"{module.name}.lora_b"].astype(np.float64) @ after[f"{module.name}.lora_a"]
        least = np.sqrt(np.sum(np.linalg.svd(whole, compute_uv=False)[module.rank :] ** 2))
        assert np.linalg.norm(kept - whole) <= least + 1e-5 * np.linalg.norm(whole)
    await site.close()


@pytest.mark.parametrize("policy", ["kill-revive", "annealed-kill-revive"])
async def test_killing_and_reviving_is_replayed(tmp_path: Path, session: aiohttp.ClientSession, policy: str) -> None:
    """Dead modules are not sent, what moved is kept with the plans, a restart changes nothing, and replay agrees."""
    annealing = ANNEALING | {"budget_end": 0.6, "temperature_start": 5.0, "temperature_end": 1.0}
    site = Site.make(tmp_path, bundle=make_bundle(tmp_path / "bundle"), policy=policy, rounds=9, annealing=annealing)
    await site.start()
    one = await site.device(session, "one")
    two = await site.device(session, "two")
    signed = await one.plan()
    lives = []
    while signed.plan.state == "train":
        lives.append(frozenset(module.name for module in signed.plan.modules if module.alive))
        for number, device in enumerate((one, two)):
            sealed = device.seal(signed, device.frame(signed, values_for(site, signed, signed.plan.round + number)))
            assert (await device.put(signed, sealed)).status == 201
        signed = await one.plan(after=signed.plan.round)
        if signed.plan.round == 4:
            await site.restart()
    await site.close()
    assert len(lives[0]) == 4
    assert all(0 < len(living) < 4 for living in lives[4:])
    found = await replay(site)
    assert found.exit_code == 0, found.output
    assert found.stdout.count("as signed") == 9
