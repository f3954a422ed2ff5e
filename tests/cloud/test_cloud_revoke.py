"""A revoked device: its key is refused for good under any name, and what was counted of it stays counted."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import closing

import aiohttp
import pytest
from click.testing import CliRunner, Result
from cloud_fleet import Device, Site, values_for

from cloud import audit, events
from cloud.commands import cloud
from cloud.errors import ServerRefusedError
from cloud.kept import open_kept
from edge_runtime import wire
from edge_runtime.wire import resources


async def ask(site: Site, command: str, *options: str) -> Result:
    """In a thread: a command has an event loop of its own."""
    return await asyncio.to_thread(CliRunner().invoke, cloud, [command, "--config", str(site.folder), *options])


async def revoke(site: Site, *options: str) -> Result:
    return await ask(site, "revoke", "--device", "one", *options)


def sealed(device: Device, signed: wire.SignedPlan) -> bytes:
    return device.seal(signed, device.frame(signed, values_for(device.site, signed, 1)))


@pytest.fixture
async def one(site: Site, session: aiohttp.ClientSession) -> Device:
    site.clock.now = int(time.time())  # commands have the real clock
    return await site.device(session, "one")


async def test_its_key_is_refused_also_after_a_restart(site: Site, one: Device) -> None:
    told = await revoke(site, "--json")
    assert told.exit_code == 0, told.output
    expected = {"device": "one", "revoked": site.clock.now, "already": False, "updates": 0, "open_round": None}
    assert json.loads(told.stdout) == expected
    target = resources.plan_target("tiny", after=-1, wait_s=0)
    for _ in range(2):
        answer = await one.send("GET", target)
        assert (answer.status, answer.problem()) == (403, "DeviceRevokedError")
        await site.restart()
    assert [event for event in site.events if isinstance(event, events.DeviceRevoked)] == [events.DeviceRevoked("one")]


async def test_asked_again_nothing_changes_and_a_line_says_so(site: Site, one: Device) -> None:
    first = await revoke(site)
    assert first.stdout == (
        "one is revoked: its key is refused from now on; 0 updates of applied rounds stay counted\n"
    )
    head = (await site.operator.status()).audit_head
    site.clock.now += 60
    again = await revoke(site)
    assert again.exit_code == 0
    assert again.stdout.startswith("one was revoked already, at 20")
    assert (await site.operator.status()).audit_head == head


async def test_neither_its_name_nor_its_key_come_back(site: Site, one: Device) -> None:
    """Not even by a token for its name that was made before, or when it had left."""
    await one.send("DELETE", resources.DEVICE.format(device="one"))
    spare = wire.Token.parse((await site.operator.make_token("one", 60)).token)
    assert (await revoke(site)).exit_code == 0
    with pytest.raises(wire.DeviceRevokedError, match="this name was revoked"):
        await Device(site, one.session, "one").enrol(spare)
    with pytest.raises(ServerRefusedError, match="its name does not come back"):
        await site.operator.make_token("one", 60)
    token = wire.Token.parse((await site.operator.make_token("other", 60)).token)
    with pytest.raises(wire.DeviceRevokedError, match="its key, as that of one, was revoked"):
        await Device(site, one.session, "other", one.key).enrol(token)
    await Device(site, one.session, "other").enrol(token)  # the refusal did not use it up


async def test_what_was_counted_stays_counted(site: Site, session: aiohttp.ClientSession, one: Device) -> None:
    two = await site.device(session, "two")
    for round_ in range(2):
        signed = await one.plan(after=round_ - 1)
        assert (await one.put(signed, sealed(one, signed))).status == 201
        if not round_:
            await two.put(signed, sealed(two, signed))
    told = await revoke(site)
    assert "1 update of applied rounds and the one counted in round 2, which is open, stay counted" in told.stdout
    await two.put(signed, sealed(two, signed))
    await two.plan(after=1)
    assert [round_.devices for round_ in (await site.operator.status()).history] == [2, 2]


async def test_an_update_and_a_poll_under_way_are_refused(site: Site, one: Device) -> None:
    signed = await one.plan()
    body, path = sealed(one, signed), resources.update_path("tiny", 0, "one")
    poll = asyncio.ensure_future(one.send("GET", resources.plan_target("tiny", after=0, wait_s=1)))

    async def slowly():
        yield body[:50]
        await site.operator.revoke("one")
        yield body[50:]

    headers = one.head("PUT", path, body) | {"Content-Length": str(len(body))}
    async with one.session.put(site.server.url + path, data=slowly(), headers=headers) as response:
        assert response.status == 403
    assert (await poll).problem() == "DeviceRevokedError"
    assert (await site.operator.status()).received == 0


async def test_devices_and_status_show_it(site: Site, one: Device) -> None:
    await one.plan()
    assert (await revoke(site)).exit_code == 0
    assert "revoked" in (await ask(site, "devices")).stdout.splitlines()[1]
    device = json.loads((await ask(site, "devices", "--json")).stdout)
    assert (device["revoked"], device["left"]) == (site.clock.now, False)
    assert "revoked" in (await ask(site, "status")).stdout


async def test_the_log_has_it_and_misses_a_row_that_was_deleted(site: Site, one: Device) -> None:
    await revoke(site)
    await site.close()

    async def check() -> audit.Broken | None:
        async with open_kept(site.config) as (database, _):
            found = await database.call(database.audited)
        assert audit.check_chain(found.links) is None
        key = one.key.public_key().public_bytes_raw().hex()
        assert audit.decode_entry(found.links[-1].text) == audit.DeviceRevoked("one", key)
        return audit.check_facts(found.links, found.facts)

    assert await check() is None
    with closing(sqlite3.connect(site.config.data_path / "emberlora.sqlite3")) as connection:
        connection.execute("DELETE FROM revocations")
        connection.commit()
    broken = await check()
    assert broken is not None
    assert "device one: revoked" in broken.how


async def test_a_store_from_before_gets_the_table(site: Site, one: Device) -> None:
    await site.close()
    site.make_older("revocations")
    await site.start()
    assert (await revoke(site)).exit_code == 0


async def test_unknown_names_and_other_callers_are_refused(site: Site, one: Device) -> None:
    unknown = await ask(site, "revoke", "--device", "nobody")
    assert (unknown.exit_code, unknown.stderr) == (2, "emberlora cloud: device nobody: was never enrolled\n")
    assert (await ask(site, "revoke", "--device", "operator")).exit_code == 2
    assert (await ask(site, "revoke", "--device", "no name")).exit_code == 2
    body = wire.encode_message(wire.Revocation(device="one"))
    assert (await one.send("POST", resources.OPERATOR_REVOCATIONS, body)).problem() == "NotPermittedError"
    await site.close()
    assert (await revoke(site)).exit_code == 1
