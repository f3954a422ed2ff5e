"""A device replaces its key: the old one is refused from then on, and none may change to it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import aiohttp
import pytest
from cloud_fleet import Answer, Device, Site
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud import audit, events
from cloud.kept import open_kept
from edge_runtime import wire
from edge_runtime.wire import resources


def hexed(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


async def rekey(device: Device, key: Ed25519PrivateKey, **changes: str) -> Answer:
    message = replace_struct(wire.new_key(device.name, key), **changes)
    return await device.send("PUT", resources.DEVICE_KEY.format(device=device.name), wire.encode_message(message))


def replace_struct(message: wire.NewKey, **changes: str) -> wire.NewKey:
    return wire.NewKey(**{"signing_key": message.signing_key, "proof": message.proof} | changes)


@pytest.fixture
async def one(site: Site, session: aiohttp.ClientSession) -> Device:
    return await site.device(session, "one")


@pytest.fixture
def renewed(one: Device) -> Device:
    """The same device with another key."""
    return replace(one, key=Ed25519PrivateKey.generate())


async def poll(device: Device) -> Answer:
    return await device.send("GET", resources.plan_target("tiny", after=-1, wait_s=0))


async def test_the_new_key_counts_and_the_old_one_does_not(site: Site, one: Device, renewed: Device) -> None:
    assert (await rekey(one, renewed.key)).status == 204
    assert (await rekey(renewed, renewed.key)).status == 204  # its answer was lost: it asks again, and has it already
    for _ in range(2):
        assert (await poll(one)).problem() == "SignatureError"
        assert (await poll(renewed)).status == 200
        await site.restart()
    assert [event for event in site.events if isinstance(event, events.DeviceRekeyed)] == [events.DeviceRekeyed("one")]
    await site.close()
    async with open_kept(site.config) as (database, _):
        found = await database.call(database.audited)
    assert audit.check_chain(found.links) is None
    assert audit.check_facts(found.links, found.facts) is None
    assert audit.decode_entry(found.links[-1].text) == audit.DeviceRekeyed("one", hexed(renewed.key))


async def test_a_key_of_which_it_has_no_proof_is_refused(site: Site, one: Device, renewed: Device) -> None:
    """Nor one proven for another device; else it could name, and so lock in, what is not its own."""
    for proof in ("00" * 64, wire.new_key("two", renewed.key).proof):
        assert (await rekey(one, renewed.key, proof=proof)).problem() == "SignatureError"
    assert (await poll(one)).status == 200


async def test_no_key_comes_back_and_none_is_shared(site: Site, one: Device, renewed: Device) -> None:
    two = await site.device(one.session, "two")
    assert (await rekey(one, two.key)).problem() == "NotPermittedError"
    assert (await rekey(one, renewed.key)).status == 204
    assert (await rekey(renewed, one.key)).problem() == "NotPermittedError"
    assert (await rekey(two, one.key)).problem() == "NotPermittedError"
    await site.operator.revoke("one")
    assert (await rekey(two, renewed.key)).problem() == "NotPermittedError"
    assert (await poll(two)).status == 200


async def test_only_for_itself_and_not_when_revoked(site: Site, one: Device, renewed: Device) -> None:
    two = await site.device(one.session, "two")
    body = wire.encode_message(wire.new_key("one", renewed.key))
    path = resources.DEVICE_KEY.format(device="one")
    assert (await two.send("PUT", path, body)).problem() == "NotPermittedError"
    await site.operator.revoke("one")
    assert (await rekey(one, renewed.key)).problem() == "DeviceRevokedError"


async def test_a_revocation_takes_the_newest_key(site: Site, one: Device, renewed: Device) -> None:
    await rekey(one, renewed.key)
    await site.operator.revoke("one")
    token = wire.Token.parse((await site.operator.make_token("other", 60)).token)
    with pytest.raises(wire.DeviceRevokedError, match="its key, as that of one"):
        await Device(site, one.session, "other", renewed.key).enrol(token)


async def test_a_revocation_beside_a_change_of_keys_takes_the_new_one(site: Site, one: Device, renewed: Device) -> None:
    members = site.server.aggregator.members
    new = wire.new_key("one", renewed.key)
    await asyncio.gather(members.rekey("one", new), members.revoke(wire.Revocation(device="one")))
    await site.close()
    async with open_kept(site.config) as (database, _):
        (found,) = await database.call(database.revocations)
    assert found.signing_key == new.signing_key
