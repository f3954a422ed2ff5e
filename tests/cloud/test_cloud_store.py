"""The data folder: whose it is, what is damaged, and who else may not use it; failures change nothing."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import aiohttp
import pytest
from cloud_fleet import Site, make_bundle, values_for

from cloud import events
from cloud.config import parse_config
from cloud.errors import ConfigError, DataError, DataLockedError, DataMissingError, DataSchemaError
from cloud.store import OBJECTS, UPDATES, Blobs


def test_blobs_are_checked_and_named_by_digest(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    digest = blobs.put(OBJECTS, b"adapter")
    assert blobs.get(OBJECTS, digest) == b"adapter"
    blobs.path(OBJECTS, digest).write_bytes(b"adaptex")
    with pytest.raises(DataMissingError, match="damaged on disk"):
        blobs.get(OBJECTS, digest)
    assert blobs.put(OBJECTS, b"adapter") == digest
    assert blobs.get(OBJECTS, digest) == b"adapter"
    with pytest.raises(DataMissingError, match="not in"):
        blobs.get(UPDATES, digest)
    with pytest.raises(DataMissingError, match="not a digest"):
        blobs.get(OBJECTS, "../../etc/passwd")
    blobs.keep_only(OBJECTS, set())
    assert not list((tmp_path / OBJECTS).iterdir())


async def test_two_servers_on_one_folder_are_refused(site: Site) -> None:
    with pytest.raises(DataLockedError, match="another aggregator is using this data folder"):
        await Site(site.folder, site.bundle, site.config).start()
    await site.restart()


async def test_other_task_bundle_or_version_is_refused(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    await site.restart()
    await site.close()
    path = site.folder / "emberlora.toml"
    text = path.read_text()
    site.config = parse_config(text.replace('"tiny"', '"other"').encode(), path=path)
    with pytest.raises(DataSchemaError, match=r"expected other on .* got tiny on"):
        await site.start()
    make_bundle(tmp_path / "bundle2", task="lm")
    site.config = parse_config(text.replace("../bundle", "../bundle2").encode(), path=path)
    with pytest.raises(DataSchemaError, match="another task or bundle"):
        await site.start()
    with sqlite3.connect(site.config.data_path / "emberlora.sqlite3") as database:
        database.execute("UPDATE alembic_version SET version_num = 99")
    database.close()
    site.config = parse_config(text.encode(), path=path)
    with pytest.raises(DataSchemaError, match="schema: expected 4, got 99"):
        await site.start()


async def test_config_must_fit_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task.rank \(4\) must not exceed the bundle's r_max \(3\)"):
        await Site.make(tmp_path, rank=4).start()


async def test_smaller_rank_cuts_the_adapter(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    site = Site.make(tmp_path, rank=2)
    await site.start()
    plan = (await (await site.device(session, "one")).plan()).plan
    assert set(plan.ranks.values()) == {2}
    await site.close()


async def test_damaged_update_stops_a_restart(site: Site, session: aiohttp.ClientSession) -> None:
    """What was acknowledged and is gone is said, not passed over."""
    one = await site.device(session, "one")
    signed = await one.plan()
    await one.put(signed, one.seal(signed, one.frame(signed, values_for(site, signed, 1))))
    await site.close()
    (blob,) = (site.config.data_path / "blobs" / UPDATES).iterdir()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + b"?")
    with pytest.raises(DataMissingError, match="damaged on disk"):
        await site.start()
    blob.write_bytes(data)
    await site.start()
    assert (await site.operator.status()).received == 1


async def test_orphan_blobs_are_swept(site: Site) -> None:
    """A blob whose row never came (a kill between the two) is not an update."""
    await site.close()
    orphan = site.config.data_path / "blobs" / UPDATES / ("ab" * 32)
    orphan.write_bytes(b"x")
    await site.start()
    assert not orphan.exists()
    assert (await site.operator.status()).received == 0


async def test_failed_write_changes_nothing_and_is_retried(
    site: Site, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    sealed = one.seal(signed, one.frame(signed, values_for(site, signed, 1)))
    full = True
    real = Blobs.write

    def write(self: Blobs, kind, data: bytes, digest: str | None = None) -> str:
        if full:
            raise DataError("blob: cannot be stored: no space left")
        return real(self, kind, data, digest)

    monkeypatch.setattr(Blobs, "write", write)
    refused = await one.put(signed, sealed)
    assert (refused.status, refused.problem(), refused.headers["Retry-After"]) == (503, "UnavailableError", "5")
    assert b"no space" not in refused.body
    assert (await site.operator.status()).received == 0
    full = False
    assert (await one.put(signed, sealed)).status == 201
    assert (await two.put(signed, two.seal(signed, two.frame(signed, values_for(site, signed, 2))))).status == 201
    assert (await one.plan(after=0)).plan.round == 1
    assert [event for event in site.events if isinstance(event, events.WorkFailed)]


async def test_round_that_cannot_be_applied_is_tried_again(
    site: Site, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [await site.device(session, name) for name in ("one", "two")]
    signed = await devices[0].plan()
    failures = 2
    real = Blobs.write

    def write(self: Blobs, kind, data: bytes, digest: str | None = None) -> str:
        nonlocal failures
        if kind == OBJECTS and failures:
            failures -= 1
            raise DataError("blob: cannot be stored: no space left")
        return real(self, kind, data, digest)

    monkeypatch.setattr(Blobs, "write", write)
    for device in devices:
        await device.put(signed, device.seal(signed, device.frame(signed, values_for(site, signed, 1))))
    assert (await devices[0].plan(after=0)).plan.round == 1
    assert failures == 0


async def test_keys_and_database_are_for_the_owner_only(site: Site) -> None:
    data = site.config.data_path
    assert data.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (data / "keys").iterdir())


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
async def test_unwritable_folder_is_one_line(site: Site) -> None:
    await site.close()
    site.config.data_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot be used as data folder"):
        await site.start()
    site.config.data_path.chmod(0o700)
