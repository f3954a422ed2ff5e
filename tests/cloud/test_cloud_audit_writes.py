"""What a task writes to its audit log: every fact with its entry, in the same transaction, and no secret."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest
from cloud_fleet import Device, Site, spawn, values_for

from cloud import audit
from cloud.errors import ServerRefusedError
from cloud.kept import open_kept
from cloud.keys import KEYS_FOLDER, load_keys
from cloud.store.log import Audited
from edge_runtime import wire
from edge_runtime.wire import resources


async def read(site: Site) -> Audited:
    """The log of a site whose server does not run."""
    async with open_kept(site.config) as (database, _):
        return await database.call(database.audited)


def entries(audited: Audited) -> list[audit.Entry]:
    assert audit.check_chain(audited.links) is None
    assert audit.check_facts(audited.links, audited.facts) is None
    return [audit.decode_entry(link.text) for link in audited.links]


def kinds(audited: Audited) -> list[str]:
    return [str(entry.__struct_config__.tag) for entry in entries(audited)]


def sealed(device: Device, signed: wire.SignedPlan) -> bytes:
    return device.seal(signed, device.frame(signed, values_for(device.site, signed, 1)))


def sql(site: Site, *statements: str) -> None:
    with closing(sqlite3.connect(site.config.data_path / "emberlora.sqlite3")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


async def test_a_whole_task_in_order(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    site = Site.make(tmp_path, rounds=2)
    await site.start()
    one, two = await site.device(session, "one"), await site.device(session, "two")
    digests, plans = [], []
    for round_ in range(2):
        signed = await one.plan(after=round_ - 1)
        plans.append(signed)
        for device in (one, two):
            answer = await device.put(signed, sealed(device, signed))
            digests.append(wire.decode_message(answer.body, wire.UpdateReceipt).digest)
    plans.append(await one.plan(after=1))
    status = await site.operator.status()
    await one.send("DELETE", resources.DEVICE.format(device="one"))
    await site.close()
    audited = await read(site)
    counted = ["update-counted", "update-counted", "round-applied", "plan-signed"]
    joined = ["token-made", "device-enrolled"] * 2
    assert kinds(audited) == ["log-begun", "plan-signed", *joined, *counted, *counted, "device-left"]
    found = entries(audited)
    assert [entry.digest for entry in found if isinstance(entry, audit.UpdateCounted)] == digests
    signed_plans = [entry for entry in found if isinstance(entry, audit.PlanSigned)]
    assert [(entry.plan, entry.adapter) for entry in signed_plans] == [(p.digest, p.plan.adapter) for p in plans]
    assert [entry.finished for entry in signed_plans] == [False, False, True]
    applied = [entry for entry in found if isinstance(entry, audit.RoundApplied)]
    assert [entry.adapter for entry in applied] == [plan.plan.adapter for plan in plans[1:]]
    assert found[-1] == audit.DeviceLeft("one", "one")
    assert status.audit_head == audited.links[-2].digest
    assert {link.time_ms for link in audited.links} == {int(site.clock.now * 1000)}


async def test_a_stopped_task_and_a_device_sent_away(site: Site, session: aiohttp.ClientSession) -> None:
    one = await site.device(session, "one")
    signed = await one.plan()
    await one.put(signed, sealed(one, signed))
    operator = Device(site, session, "operator", site.operator_key())
    assert (await operator.send("DELETE", resources.DEVICE.format(device="one"))).status == 204
    await site.operator.stop()
    await site.operator.stop()
    await site.close()
    found = entries(await read(site))[-4:]
    assert found[:3] == [audit.DeviceLeft("one", "operator"), audit.StopAsked(0), audit.RoundDiscarded(0, 1)]
    assert isinstance(found[3], audit.PlanSigned)
    assert found[3].finished


async def test_a_repeated_enrolment_or_update_is_no_second_entry(site: Site, session: aiohttp.ClientSession) -> None:
    one = Device(site, session, "one")
    token = wire.Token.parse((await site.operator.make_token("one", 60)).token)
    await one.enrol(token)
    await one.enrol(token)
    signed = await one.plan()
    body = sealed(one, signed)
    assert [(await one.put(signed, body)).status for _ in range(2)] == [201, 200]
    await site.close()
    assert kinds(await read(site)) == ["log-begun", "plan-signed", "token-made", "device-enrolled", "update-counted"]


async def test_refusals_fill_no_disk(site: Site, session: aiohttp.ClientSession) -> None:
    """One entry a device, problem and round, however often it tries, and whether or not the server restarts."""
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()

    async def bother(device: Device) -> None:
        for _ in range(3):
            await device.put(signed, b"x")
            await site.server.aggregator.members.flush()

    await bother(one)
    await site.restart()
    await bother(one)
    await bother(two)
    for device in (one, two):
        assert (await device.put(signed, sealed(device, signed))).status == 201
    assert (await one.plan(after=0)).plan.round == 1
    await bother(one)
    await site.close()
    refused = [entry for entry in entries(await read(site)) if isinstance(entry, audit.UpdateRefused)]
    assert refused == [
        audit.UpdateRefused(0, "one", "update-format"),
        audit.UpdateRefused(0, "two", "update-format"),
        audit.UpdateRefused(1, "one", "round-closed"),
    ]


async def test_a_folder_from_before_the_log_says_so(site: Site, session: aiohttp.ClientSession) -> None:
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    await one.put(signed, sealed(one, signed))
    await site.close()
    site.make_older("audit", "refusals_logged")
    await site.start()
    await two.put(signed, sealed(two, signed))
    assert (await one.plan(after=0)).plan.round == 1
    await site.restart()
    await site.close()
    audited = await read(site)
    assert kinds(audited) == ["log-taken-up", "update-counted", "round-applied", "plan-signed"]
    first = entries(audited)[0]
    assert (first.task, first.facts) == ("tiny", 2)  # a plan and an update
    sql(site, "UPDATE updates SET digest = 'ab' WHERE device = 'one'")
    changed = await read(site)
    assert audit.check_facts(changed.links, changed.facts).number == 0


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        ("updates", "update-counted"),
        ("devices", "device-enrolled"),
        ("tokens", "token-made"),
        ("rounds", "plan-signed"),
    ],
)
@pytest.mark.parametrize("failing", ["fact", "entry"])
async def test_neither_fact_nor_entry_is_ever_alone(
    site: Site, session: aiohttp.ClientSession, table: str, kind: str, failing: str
) -> None:
    """Whichever of the two writes fails takes the other one with it."""
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    await two.put(signed, sealed(two, signed))
    await site.close()
    before = await read(site)
    on = table if failing == "fact" else "audit"
    when = "1" if failing == "fact" else f"NEW.text LIKE '%\"{kind}\"%'"
    sql(site, f"CREATE TRIGGER full AFTER INSERT ON {on} WHEN {when} BEGIN SELECT RAISE(ABORT, 'full'); END")
    await site.start()
    if table == "updates":
        assert (await one.put(signed, sealed(one, signed))).status == 503
    elif table == "rounds":
        await one.put(signed, sealed(one, signed))
        assert await one.plan(after=0, wait_s=1) is None
    else:
        with pytest.raises((ServerRefusedError, wire.UnavailableError)):
            await site.device(session, "three")
    await site.close()
    sql(site, "DROP TRIGGER full")
    after = await read(site)
    new = kinds(after)[len(before.links) :]
    assert new == {"updates": [], "rounds": ["update-counted"], "tokens": [], "devices": ["token-made"]}[table]


async def test_a_killed_server_leaves_a_whole_log(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """kill -9 right after an answer: what was acknowledged is in store and log, and the chain goes on."""
    site = Site.make(tmp_path, rounds=1)
    site.clock.now = time.time()
    process = spawn(site)
    try:
        one, two = await site.device(session, "one"), await site.device(session, "two")
        signed = await one.plan()
        assert (await one.put(signed, sealed(one, signed))).status == 201
        process.kill()
        process.communicate()
        assert kinds(await read(site))[-1] == "update-counted"
        process = spawn(site)
        assert (await two.put(signed, sealed(two, signed))).status == 201
        await one.plan(after=0)
    finally:
        process.kill()
        process.communicate()
    assert kinds(await read(site))[-3:] == ["update-counted", "round-applied", "plan-signed"]


async def test_no_secret_is_in_the_log(site: Site, session: aiohttp.ClientSession) -> None:
    one = Device(site, session, "one")
    answer = await site.operator.make_token("one", 60)
    token = wire.Token.parse(answer.token)
    await one.enrol(token)
    await site.close()
    async with open_kept(site.config) as (database, kept):
        log = await database.call(database.audited)
    text = "\n".join(link.text for link in log.links)
    keys = load_keys(site.config.data_path / KEYS_FOLDER)
    secrets = [key.private_bytes_raw().hex() for key in (keys.plan, keys.operator, one.key)]
    secrets += [token.secret, answer.token, *(record.round_key.hex() for record in kept.records)]
    assert len(secrets) == 6
    assert not [secret for secret in secrets if secret in text]
    used = hashlib.sha256(bytes.fromhex(token.secret)).hexdigest()
    tokens = [getattr(audit.decode_entry(link.text), "token", None) for link in log.links]
    assert tokens == [None, None, used, used]
    assert one.key.public_key().public_bytes_raw().hex() in text
