"""Updates in parts: what was sent stays sent, whatever is cut, killed or full; the whole counts once or not at all."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
from itertools import pairwise
from pathlib import Path

import aiohttp
import pytest
from cloud_fleet import Answer, Device, Site, values_for
from hypothesis import given
from hypothesis import strategies as st

from cloud.errors import DataFullError
from cloud.http.parts import Part, PartsDesk
from cloud.store import Parts
from edge_runtime import wire
from edge_runtime.device import client as client_module
from edge_runtime.device.client import Client, Signer
from edge_runtime.device.errors import RefusedError, TransportError
from edge_runtime.device.host import Host
from edge_runtime.device.outbox import pending_for
from edge_runtime.wire import resources

DIGEST = "ad" * 32


@pytest.fixture
async def one(site: Site, session: aiohttp.ClientSession) -> Device:
    return await site.device(session, "one")


async def update(device: Device) -> tuple[wire.SignedPlan, bytes]:
    signed = await device.plan()
    return signed, device.seal(signed, device.frame(signed, values_for(device.site, signed, 1)))


async def send(device: Device, sealed: bytes, offset: int, count: int, **changes: object) -> Answer:
    """One part; ``changes`` replace what it says."""
    of = changes.get("of", len(sealed))
    digest = str(changes.get("digest", hashlib.sha256(sealed).hexdigest()))
    path = resources.parts_path("tiny", int(changes.get("round_", 0)), str(changes.get("owner", device.name)), digest)
    return await device.send(
        "PATCH", resources.part_target(path, offset=offset, of=of), sealed[offset : offset + count]
    )


async def there(device: Device, sealed: bytes, round_: int = 0) -> wire.UpdateProgress:
    path = resources.parts_path("tiny", round_, device.name, hashlib.sha256(sealed).hexdigest())
    return wire.decode_message((await device.send("GET", path)).body, wire.UpdateProgress)


def files(site: Site) -> list[str]:
    """Of all parts. The server may be removing folders meanwhile, which `rglob` of Python 3.11 takes for an error."""
    folder = site.config.data_path / "parts"
    return sorted(os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names)


def client_of(device: Device) -> Client:
    return Client(device.site.server.url, Host(clock=device.site.clock), signer=Signer(device.name, device.key))


async def test_parts_make_an_update(site: Site, one: Device, session: aiohttp.ClientSession) -> None:
    """The receipt is that of a whole one, and so is what is stored; nothing of the parts is left."""
    signed, sealed = await update(one)
    assert (await there(one, sealed)).received == 0
    answers = [await send(one, sealed, offset, 100) for offset in range(0, len(sealed), 100)]
    assert [answer.status for answer in answers] == [200] * (len(answers) - 1) + [201]
    assert wire.decode_message(answers[0].body, wire.UpdateProgress).received == 100
    receipt = wire.decode_message(answers[-1].body, wire.UpdateProgress).receipt
    assert receipt == wire.UpdateReceipt("one", 0, hashlib.sha256(sealed).hexdigest(), 10)
    assert (await there(one, sealed)).receipt == receipt
    assert files(site) == []
    whole = await one.put(signed, sealed)
    assert (whole.status, wire.decode_message(whole.body, wire.UpdateReceipt)) == (200, receipt)
    again = await send(one, sealed, 0, 100)
    assert (again.status, wire.decode_message(again.body, wire.UpdateProgress).receipt) == (200, receipt)
    assert (await site.operator.status()).received == 1


async def test_a_device_goes_on_where_a_restarted_server_was(
    site: Site, one: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No byte that was acknowledged is sent again."""
    monkeypatch.setattr(client_module, "PART_BYTES", 64)
    signed, sealed = await update(one)
    pending = pending_for("tiny", 0, signed.digest, sealed=sealed, weight=10)
    await send(one, sealed, 0, 150)
    await site.restart()
    async with client_of(one) as client:
        receipt = await client.upload(pending, sealed)
        assert client.traffic.up == len(sealed) - 150
    assert receipt.digest == pending.digest
    assert (await site.operator.status()).received == 1


async def test_a_cut_costs_one_part(site: Site, one: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says that there was progress, so that the device does not wait longer and longer."""
    monkeypatch.setattr(client_module, "PART_BYTES", 64)
    signed, sealed = await update(one)
    pending = pending_for("tiny", 0, signed.digest, sealed=sealed, weight=10)
    real, calls = Parts.append, 0

    def failing(self: Parts, *args: object, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise DataFullError("planted")
        real(self, *args, offset=offset)

    monkeypatch.setattr(Parts, "append", failing)
    async with client_of(one) as client:
        with pytest.raises(TransportError, match="disk is full") as caught:
            await client.upload(pending, sealed)
        assert caught.value.progress
        await client.upload(pending, sealed)
        assert client.traffic.up == len(sealed) + 64
    assert (await site.operator.status()).received == 1


async def test_what_does_not_fit_together_is_refused_and_changes_nothing(site: Site, one: Device) -> None:
    _, sealed = await update(one)
    await send(one, sealed, 0, 100)
    before = files(site)
    most = len(sealed)
    refused = {
        "UpdateOffsetError": [await send(one, sealed, 50, 10), await send(one, sealed, 200, 10)],
        "UpdateFormatError": [
            await send(one, sealed, 100, 10, of=most + 1),
            await send(one, sealed + b"x" * 100, 100, most, of=most, digest=hashlib.sha256(sealed).hexdigest()),
            await send(one, sealed, 100, 0),
        ],
        "NotPermittedError": [await send(one, sealed, 100, 10, owner="two")],
        "RequestFormatError": [await send(one, sealed, 100, 10, digest="ad")],
        "RoundClosedError": [await send(one, sealed, 100, 10, round_=1)],
    }
    assert {name: {answer.problem() for answer in answers} for name, answers in refused.items()} == {
        name: {name} for name in refused
    }
    assert files(site) == before
    assert (await there(one, sealed)).received == 100


async def test_a_whole_that_is_not_its_digest_is_gone(site: Site, one: Device) -> None:
    """As after a power cut that left other bytes than were acknowledged."""
    _, sealed = await update(one)
    await send(one, sealed, 0, 100)
    (path,) = (site.config.data_path / "parts").rglob("*" + hashlib.sha256(sealed).hexdigest())
    path.write_bytes(b"x" * 100)
    assert (await send(one, sealed, 100, len(sealed))).problem() == "UpdateDigestError"
    assert (await there(one, sealed)).received == 0
    assert (await send(one, sealed, 0, len(sealed))).status == 201


async def test_bytes_that_do_not_open_are_refused_and_gone(site: Site, one: Device) -> None:
    _, sealed = await update(one)
    other = bytes([sealed[0] ^ 1]) + sealed[1:]
    assert (await send(one, other, 0, len(other))).problem() == "EnvelopeError"
    assert files(site) == []
    assert (await site.operator.status()).received == 0


async def test_an_update_that_was_whole_when_the_server_was_killed_needs_no_more_bytes(
    site: Site, one: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PART_BYTES", 64)
    signed, sealed = await update(one)
    pending = pending_for("tiny", 0, signed.digest, sealed=sealed, weight=10)
    site.server.aggregator.parts.append(0, "one", pending.digest, sealed, offset=0)
    await site.restart()
    async with client_of(one) as client:
        assert (await client.upload(pending, sealed)).digest == pending.digest
        assert client.traffic.up == 0
    assert files(site) == []


async def test_a_new_update_takes_the_place_of_an_unfinished_one(site: Site, one: Device) -> None:
    signed, first = await update(one)
    second = one.seal(signed, one.frame(signed, values_for(site, signed, 2)))
    await send(one, first, 0, 100)
    await send(one, second, 0, 70)
    assert (await there(one, first)).received == 0
    assert (await there(one, second)).received == 70
    assert len(files(site)) == 1


async def test_parts_end_with_their_round(site: Site, one: Device, session: aiohttp.ClientSession) -> None:
    signed, sealed = await update(one)
    await send(one, sealed, 0, 100)
    for name in ("two", "three"):
        device = await site.device(session, name)
        assert (await device.put(signed, (await update(device))[1])).status == 201
    assert (await one.plan(after=0)).plan.round == 1
    for _ in range(100):
        if not files(site):
            break
        await asyncio.sleep(0.02)
    assert files(site) == []
    assert (await send(one, sealed, 100, 10)).problem() == "RoundClosedError"


@pytest.mark.parametrize(("offset", "count"), [(0, 50), (100, 50), (100, None)], ids=["first", "middle", "last"])
async def test_a_round_that_ends_while_a_part_comes(
    site: Site, one: Device, session: aiohttp.ClientSession, offset: int, count: int | None
) -> None:
    """The device is told so, not of a fault of the server, and nothing of its update is left."""
    signed, sealed = await update(one)
    await send(one, sealed, 0, offset)
    others = [await site.device(session, name) for name in ("two", "three")]
    part = sealed[offset:][:count]

    async def read() -> bytes:
        for device in others:
            assert (await device.put(signed, (await update(device))[1])).status == 201
        await others[0].plan(after=0)
        for _ in range(100):
            if not files(site):
                break
            await asyncio.sleep(0.02)
        return part

    digest = hashlib.sha256(sealed).hexdigest()
    claimed = Part("one", "tiny", 0, digest, offset, len(sealed), len(part))
    with pytest.raises(wire.RoundClosedError):
        await PartsDesk(site.server.aggregator).take(claimed, read)
    assert files(site) == []


async def test_a_part_that_comes_while_the_last_round_is_tidied_away(
    site: Site, one: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken, as the round ends for devices only afterwards; no other round follows, and nothing of it is left."""
    _, sealed = await update(one)
    aggregator, statuses = site.server.aggregator, list[int]()
    tidy_up = aggregator._tidy_up

    async def tidy(*what: object) -> None:
        await tidy_up(*what)
        statuses.append((await send(one, sealed, 0, 100)).status)

    monkeypatch.setattr(aggregator, "_tidy_up", tidy)
    await aggregator.stop()
    assert aggregator.finished
    assert statuses == [200]
    assert files(site) == []


async def test_parts_that_were_dropped_while_another_comes_are_asked_for_again(site: Site, one: Device) -> None:
    """As after somebody has tidied the folder: the round is open, so the device begins anew."""
    _, sealed = await update(one)
    await send(one, sealed, 0, 100)

    async def read() -> bytes:
        site.server.aggregator.parts.drop(0, "one")
        return sealed[100:]

    claimed = Part("one", "tiny", 0, hashlib.sha256(sealed).hexdigest(), 100, len(sealed), len(sealed) - 100)
    with pytest.raises(wire.UpdateOffsetError, match="0 bytes of it are here"):
        await PartsDesk(site.server.aggregator).take(claimed, read)


async def test_two_parts_of_a_device_at_once_are_one_too_many(
    site: Site, one: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sealed = await update(one)
    real = Parts.append

    def slow(self: Parts, *args: object, offset: int) -> None:
        time.sleep(0.3)
        real(self, *args, offset=offset)

    monkeypatch.setattr(Parts, "append", slow)
    answers = await asyncio.gather(send(one, sealed, 0, 100), send(one, sealed, 0, 100))
    assert sorted(answer.status for answer in answers) == [200, 503]
    assert (await there(one, sealed)).received == 100


async def test_a_revoked_device_is_refused(site: Site, one: Device) -> None:
    _, sealed = await update(one)
    await send(one, sealed, 0, 100)
    await site.operator.revoke("one")
    assert (await send(one, sealed, 100, 100)).problem() == "DeviceRevokedError"


async def test_a_server_that_gives_no_receipt_is_not_obeyed(
    site: Site, one: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be asked for ever."""
    monkeypatch.setattr(client_module, "PART_BYTES", 64)
    signed, sealed = await update(one)
    pending = pending_for("tiny", 0, signed.digest, sealed=sealed, weight=10)

    async def forgetful(self: object, part: object, read: object) -> tuple[wire.UpdateProgress, bool]:
        await read()  # type: ignore[operator]
        return wire.UpdateProgress(pending.digest, part.offset + part.bytes), False  # type: ignore[attr-defined]

    monkeypatch.setattr("cloud.http.parts.PartsDesk.take", forgetful)
    async with client_of(one) as client:
        with pytest.raises(RefusedError, match="expected a receipt"):
            await client.upload(pending, sealed)


def test_a_part_that_does_not_fit_on_the_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts(tmp_path / "parts")
    parts.append(3, "pi-4", DIGEST, b"abc", offset=0)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DataFullError, match="part of update adadadadadad: cannot be stored"):
            parts.append(3, "pi-4", DIGEST, b"defg", offset=3)
    assert parts.whole(3, "pi-4", DIGEST) == b"abc"
    parts.append(3, "pi-4", DIGEST, b"hi", offset=3)
    assert parts.whole(3, "pi-4", DIGEST) == b"abchi"


@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_parts_add_up(tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int]) -> None:
    parts = Parts(tmp_path_factory.mktemp("parts"))
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in pairwise(places):
        assert parts.received(0, "a", DIGEST) == start
        parts.append(0, "a", DIGEST, data[start:end], offset=start)
    assert parts.received(0, "a", DIGEST) == len(data)
    parts.keep_only(1)
    assert parts.received(0, "a", DIGEST) == 0
