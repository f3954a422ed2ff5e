"""``emberlora cloud devices``, and what it shows besides status: arrivals and refusals are kept as they happen."""

from __future__ import annotations

import asyncio
import json

import aiohttp
from click.testing import CliRunner, Result
from cloud_fleet import Device, Site, values_for

from cloud.commands import cloud
from cloud.kept import open_kept
from edge_runtime import wire
from edge_runtime.wire import resources

PI = wire.Capability("aarch64", 4, 3906, 3000, 0.25, step_s=1.5, up_bytes_s=250_000.0)


async def ask(site: Site, *options: str) -> Result:
    """In a thread: a command has an event loop of its own."""
    return await asyncio.to_thread(CliRunner().invoke, cloud, ["devices", "--config", str(site.folder), *options])


def sealed(device: Device, signed: wire.SignedPlan) -> bytes:
    return device.seal(signed, device.frame(signed, values_for(device.site, signed, 1)))


async def test_devices_are_shown_while_the_server_runs_and_after(site: Site, session: aiohttp.ClientSession) -> None:
    one, two = await site.device(session, "one"), await site.device(session, "two")
    await one.send("PUT", resources.capability_path("tiny", "one"), wire.encode_message(PI))
    signed = await one.plan()
    for device in (one, two):
        assert (await device.put(signed, sealed(device, signed))).status == 201
    await one.plan(after=0)
    told = await ask(site, "--json")
    assert told.exit_code == 0, told.output
    first, second = (json.loads(line) for line in told.stdout.splitlines())
    assert (first["name"], first["updates"], first["capability"]["step_s"]) == ("one", 1, 1.5)
    assert (second["name"], second["capability"]) == ("two", None)
    await site.close()
    head, *lines = (await ask(site)).stdout.splitlines()
    assert head.split()[0] == "device"
    assert "aarch64, 4 cores  3,906 MB, 3,000  1.5 s  2 Mbit/s, –" in lines[0]
    assert lines[1].split()[0] == "two"


async def test_refused_updates_are_counted_by_device_and_reason(site: Site, session: aiohttp.ClientSession) -> None:
    one = await site.device(session, "one")
    signed = await one.plan()
    await one.put(signed, sealed(one, signed)[:-1])
    await one.put(signed, b"x")
    assert (await one.put(signed, sealed(one, signed))).status == 201
    await one.put(signed, sealed(one, signed))
    await site.server.aggregator.members.flush()
    await one.put(signed, sealed(one, signed))
    await site.close()
    async with open_kept(site.config) as (database, _):
        found = await database.call(database.refusals)
    assert found == {"one": {"update-format": 2, "update-conflict": 2}}


async def test_how_long_an_update_took_to_arrive_is_kept(site: Site, session: aiohttp.ClientSession) -> None:
    """By the server's clock, which the test moves while the body is under way; a repeat changes nothing."""
    one = await site.device(session, "one")
    signed = await one.plan()
    body = sealed(one, signed)
    path = resources.update_path("tiny", 0, "one")

    async def slowly():
        yield body[:50]
        await asyncio.sleep(0.05)  # the head and the first bytes are there by then
        site.clock.now += 8
        yield body[50:]

    headers = one.head("PUT", path, body) | {"Content-Length": str(len(body))}
    async with session.put(site.server.url + path, data=slowly(), headers=headers) as response:
        assert response.status == 201
    assert (await one.put(signed, body)).status == 200
    await site.close()
    async with open_kept(site.config) as (database, _):
        assert await database.call(database.arrivals) == {(0, "one"): 8.0}
