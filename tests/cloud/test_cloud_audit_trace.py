"""``emberlora cloud audit trace``: from an adapter back to the sealed updates that made it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from contextlib import closing

import aiohttp
import pytest
from click.testing import CliRunner, Result
from cloud_fleet import Device, Site, values_for

from cloud.commands import cloud
from edge_runtime import wire


async def trace(site: Site, *args: str) -> Result:
    """In a thread: a command has an event loop of its own."""
    command = ["audit", "trace", "--config", str(site.folder), *args]
    return await asyncio.to_thread(CliRunner().invoke, cloud, command)


async def rounds(site: Site, digest: str) -> list[dict]:
    result = await trace(site, digest, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


async def put(device: Device, signed: wire.SignedPlan, *, scale: float = 1.0) -> dict[str, object]:
    frame = device.frame(signed, scale * values_for(device.site, signed, 1))
    receipt = wire.decode_message((await device.put(signed, device.seal(signed, frame))).body, wire.UpdateReceipt)
    return {"device": device.name, "digest": receipt.digest, "weight": 10}


@pytest.fixture
async def run(site: Site, session: aiohttp.ClientSession) -> tuple[list[wire.SignedPlan], list[list[dict]]]:
    """A task that was stopped in its third round, when one device had sent: its plans, and what went into each."""
    devices = [await site.device(session, name) for name in ("one", "two")]
    plans, sent = [], []
    for round_ in range(2):
        plans.append(await devices[0].plan(after=round_ - 1))
        sent.append([await put(device, plans[-1]) for device in devices])
    plans.append(await devices[0].plan(after=1))
    sent.append([await put(devices[0], plans[-1])])
    await site.operator.stop()
    plans.append(await devices[0].plan(after=2))
    await site.close()
    return plans, sent


async def test_every_adapter_is_traced_to_the_updates_before_it(site: Site, run: tuple) -> None:
    """The update of the round that was stopped made nothing."""
    plans, sent = run
    assert await rounds(site, plans[0].plan.adapter) == []
    expected = [
        {
            "round": number,
            "plan": plans[number].digest,
            "before": plans[number].plan.adapter,
            "after": plans[number + 1].plan.adapter,
            "updates": sent[number],
        }
        for number in range(2)
    ]
    assert await rounds(site, plans[1].plan.adapter) == expected[:1]
    assert plans[2].plan.adapter == plans[3].plan.adapter
    assert await rounds(site, plans[2].plan.adapter) == expected


async def test_updates_that_moved_nothing_are_not_left_out(site: Site, session: aiohttp.ClientSession) -> None:
    devices = [await site.device(session, name) for name in ("one", "two")]
    first = await devices[0].plan()
    sent = [await put(device, first, scale=0.0) for device in devices]
    second = await devices[0].plan(after=0)
    assert first.plan.adapter == second.plan.adapter
    (round_,) = await rounds(site, first.plan.adapter)
    assert round_["updates"] == sent


async def test_the_published_file_is_traced(site: Site, run: tuple) -> None:
    plans, _ = run
    published = site.config.data_path / "published"
    digest = hashlib.sha256((published / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert digest != published.resolve().name == plans[-1].plan.adapter
    assert await rounds(site, digest) == await rounds(site, plans[-1].plan.adapter)


async def test_trace_for_people(site: Site, run: tuple) -> None:
    plans, sent = run
    lines = (await trace(site, plans[1].plan.adapter)).stdout.splitlines()
    before, after = plans[0].plan.adapter, plans[1].plan.adapter
    assert lines == [
        "rounds: 1, updates: 2, devices: 2",
        f"round 0: plan {plans[0].digest[:12]}, adapter {before[:12]} to {after}",
        f"  one  weight 10  {sent[0][0]['digest']}",
        f"  two  weight 10  {sent[0][1]['digest']}",
    ]
    assert (await trace(site, before)).stdout == "rounds: 0, updates: 0, devices: 0; the task began with it\n"


async def test_a_broken_log_traces_nothing(site: Site, run: tuple) -> None:
    plans, _ = run
    with closing(sqlite3.connect(site.config.data_path / "emberlora.sqlite3")) as connection:
        connection.execute("UPDATE updates SET device = 'two', round = 2 WHERE device = 'one' AND round = 2")
        connection.commit()
    for form in ([], ["--json"]):
        result = await trace(site, plans[2].plan.adapter, *form)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(
            "emberlora cloud: audit log: entry 14: the store does not say so: update of one"
        )


@pytest.mark.parametrize(
    ("digest", "message"),
    [
        ("ab" * 32, "adapter abababababab: no plan of this task names it"),
        ("5f0c", "adapter '5f0c': expected a SHA-256"),
    ],
)
async def test_bad_input_is_one_line_and_status_two(site: Site, digest: str, message: str) -> None:
    result = await trace(site, digest)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


async def test_a_task_from_before_the_log_is_traced_too(site: Site, run: tuple) -> None:
    plans, sent = run
    site.make_older("audit")
    await site.start()
    assert [round_["updates"] for round_ in await rounds(site, plans[2].plan.adapter)] == sent[:2]
