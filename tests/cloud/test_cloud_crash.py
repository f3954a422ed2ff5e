"""Late bodies, stalled bodies, and a real server process killed with -9 in the middle of a round."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import pytest
from cloud_fleet import Answer, Device, Site, spawn, values_for

from edge_runtime import wire
from edge_runtime.bundle import parse_tensors
from edge_runtime.wire import resources
from edge_runtime.wire.components import rounded


@pytest.mark.parametrize("download", ["float32", "int8"])
async def test_killed_server_goes_on_in_the_same_round(
    tmp_path: Path, session: aiohttp.ClientSession, download: str
) -> None:
    """What was acknowledged before kill -9 is in the mean after it, once, even when the device sends it again."""
    site = Site.make(tmp_path, rounds=1, download=download)
    site.clock.now = time.time()
    process = spawn(site)
    try:
        one, two = await site.device(session, "one"), await site.device(session, "two")
        signed = await one.plan()
        values = [values_for(site, signed, seed) for seed in (1, 2)]
        sealed = one.seal(signed, one.frame(signed, values[0], weight=3))
        first = await one.put(signed, sealed)
        assert first.status == 201
        before = parse_tensors((await one.blob(signed.plan.adapter)).body, what="adapter")
        process.kill()
        process.communicate()
        process = spawn(site)
        again = await one.put(signed, sealed)
        assert (again.status, again.body) == (200, first.body)
        await two.put(signed, two.seal(signed, two.frame(signed, values[1], weight=1)))
        last = await one.plan(after=0)
        assert (last.plan.state, last.plan.round) == ("finished", 1)
        after = parse_tensors((await one.blob(last.plan.adapter)).body, what="adapter")
    finally:
        process.terminate()
        process.communicate()
    mean = np.average(np.stack(values).astype(np.float64), axis=0, weights=[3, 1])
    name = "layer.0.q.lora_b"
    expected = (before[name] + mean[: before[name].size].reshape(before[name].shape)).astype(np.float32)
    np.testing.assert_array_equal(after[name], rounded(name, expected, 8) if download == "int8" else expected)


async def put_slowly(device: Device, signed: wire.SignedPlan, sealed: bytes, middle: asyncio.Event) -> Answer:
    """Send the first half of a body, wait for ``middle``, then send the rest."""
    path = resources.update_path("tiny", signed.plan.round, device.name)

    async def halves():
        yield sealed[:100]
        await middle.wait()
        yield sealed[100:]

    headers = device.head("PUT", path, sealed) | {"Content-Length": str(len(sealed))}
    url = device.site.server.url + path
    async with device.session.put(url, data=halves(), headers=headers) as response:
        return Answer(response.status, dict(response.headers), await response.read())


async def test_body_that_ends_after_its_round_is_told_so(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """The round closed while the body came in: refused by the round's state, not as an update that cannot be opened."""
    site = Site.make(tmp_path, devices_per_round=1)
    await site.start()
    slow, fast = await site.device(session, "slow"), await site.device(session, "fast")
    signed = await slow.plan()
    middle = asyncio.Event()
    late = asyncio.create_task(
        put_slowly(slow, signed, slow.seal(signed, slow.frame(signed, values_for(site, signed, 1))), middle)
    )
    await asyncio.sleep(0.1)
    await fast.put(signed, fast.seal(signed, fast.frame(signed, values_for(site, signed, 2))))
    assert (await slow.plan(after=0)).plan.round == 1
    middle.set()
    answer = await late
    assert (answer.status, answer.problem()) == (409, "RoundClosedError")
    await site.close()


async def test_stalled_body_is_cut_and_changes_nothing(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    site = Site.make(tmp_path)
    server = msgspec.structs.replace(site.config.server, request_timeout_s=0.2)
    site.config = msgspec.structs.replace(site.config, server=server)
    await site.start()
    one = await site.device(session, "one")
    signed = await one.plan()
    middle = asyncio.Event()
    sealed = one.seal(signed, one.frame(signed, values_for(site, signed, 1)))
    stalled = asyncio.create_task(put_slowly(one, signed, sealed, middle))
    await asyncio.sleep(0.5)
    middle.set()
    answer = await stalled
    assert (answer.status, answer.problem()) == (503, "UnavailableError")
    assert (await site.operator.status()).received == 0
    assert (await one.put(signed, sealed)).status == 201
    await site.close()
