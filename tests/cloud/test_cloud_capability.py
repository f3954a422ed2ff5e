"""What devices measured of themselves: checked, the newest kept, shown, and forgotten when they leave."""

from __future__ import annotations

import aiohttp
import pytest
from cloud_fleet import START, Device, Site

from edge_runtime import wire
from edge_runtime.wire import resources

PI = wire.Capability("aarch64", 4, 3906, 3000, 0.25)
LATER = wire.Capability("aarch64", 4, 3906, 2000, 0.25, step_s=1.5, up_bytes_s=250_000.0)


async def tell(device: Device, capability: wire.Capability | bytes, *, name: str = "", task: str = "tiny") -> object:
    body = capability if isinstance(capability, bytes) else wire.encode_message(capability)
    return await device.send("PUT", resources.capability_path(task, name or device.name), body)


@pytest.fixture
async def one(site: Site, session: aiohttp.ClientSession) -> Device:
    return await site.device(session, "one")


async def status_of(site: Site, name: str) -> wire.DeviceStatus:
    return next(device for device in (await site.operator.status()).devices if device.name == name)


async def test_the_newest_is_kept_and_shown_also_after_a_restart(site: Site, one: Device) -> None:
    assert (await status_of(site, "one")).capability is None
    answer = await tell(one, PI)
    assert (answer.status, answer.body) == (204, b"")
    assert (await status_of(site, "one")).capability == PI
    site.clock.now += 60
    assert (await tell(one, LATER)).status == 204
    await site.restart()
    found = await status_of(site, "one")
    assert (found.capability, found.capability_told) == (LATER, START + 60)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b'{"machine":"x","cores":1,"memory_mb":1,"available_mb":2}', wire.encode_message(PI)[:-1]]
)
async def test_what_is_none_is_refused_and_changes_nothing(site: Site, one: Device, body: bytes) -> None:
    await tell(one, PI)
    answer = await tell(one, body)
    assert (answer.status, answer.problem()) == (400, "RequestFormatError")
    assert (await status_of(site, "one")).capability == PI


async def test_a_device_speaks_for_itself_only(site: Site, session: aiohttp.ClientSession, one: Device) -> None:
    await site.device(session, "two")
    answer = await tell(one, PI, name="two")
    assert (answer.status, answer.problem()) == (403, "NotPermittedError")
    assert (await status_of(site, "two")).capability is None
    elsewhere = await tell(one, PI, task="other")
    assert (elsewhere.status, elsewhere.problem()) == (404, "NotFoundError")


async def test_other_bytes_than_signed_are_refused(site: Site, one: Device) -> None:
    path = resources.capability_path("tiny", "one")
    answer = await one.send("PUT", path, wire.encode_message(LATER), one.head("PUT", path, wire.encode_message(PI)))
    assert (answer.status, answer.problem()) == (400, "UpdateDigestError")
    assert (await status_of(site, "one")).capability is None


async def test_it_is_forgotten_when_the_device_leaves(site: Site, one: Device) -> None:
    await tell(one, PI)
    assert (await one.send("DELETE", resources.DEVICE.format(device="one"))).status == 204
    assert (await status_of(site, "one")).capability is None


async def test_a_data_folder_from_before_goes_on(site: Site, session: aiohttp.ClientSession) -> None:
    """The table is made where it is missing; nothing else of the folder changes."""
    one = await site.device(session, "one")
    await site.close()
    site.make_older("capabilities")
    await site.start()
    assert (await tell(one, PI)).status == 204
    assert (await status_of(site, "one")).capability == PI
