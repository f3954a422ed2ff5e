"""A backup is one moment of a task, whether its server runs or not, and a server goes on from it."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import stat
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner, Result
from cloud_fleet import Site, values_for

import cloud.backup
from cloud.commands import cloud as command
from cloud.config import load_config
from cloud.store import OBJECTS, UPDATES


def back_up(site: Site, out: Path, *more: str) -> Result:
    return CliRunner().invoke(command, ["backup", "--config", str(site.folder), "--out", str(out), *more])


async def _send(site: Site, session: aiohttp.ClientSession, name: str, seed: int) -> None:
    device = await site.device(session, name)
    signed = await device.plan()
    assert signed is not None
    answer = await device.put(signed, device.seal(signed, device.frame(signed, values_for(site, signed, seed))))
    assert answer.status in (200, 201), answer


def _restored(site: Site, backup: Path, to: Path) -> Site:
    """A site of its own on a backup, beside the same bundle."""
    shutil.copytree(backup, to)
    path = to / "emberlora.toml"
    return Site(to, site.bundle, load_config(path))


async def test_a_task_goes_on_from_a_backup_of_a_running_server(tmp_path: Path) -> None:
    """The counted update of the open round is in it: the second one closes the round, to the very same adapter."""
    site = Site.make(tmp_path)
    async with aiohttp.ClientSession() as session:
        await site.start()
        await _send(site, session, "one", 1)
        found = await cloud.backup.back_up(site.config, site.folder / "emberlora.toml", tmp_path / "backup")
        assert (found.round, found.updates) == (0, 1)
        assert found.audit_head == (await site.operator.status()).audit_head
        await _send(site, session, "two", 2)
        await site.tick()
        wanted = await site.operator.status()
        assert wanted.round == 1
        await site.close()

        again = _restored(site, tmp_path / "backup", tmp_path / "again")
        await again.start()
        status = await again.operator.status()
        assert (status.round, status.received) == (0, 1)
        await _send(again, session, "two", 2)
        await again.tick()
        assert (await again.operator.status()).adapter == wanted.adapter
        await again.close()


async def test_a_round_that_ends_meanwhile_means_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its updates are deleted between the database's copy and theirs; the copy is then of the next round."""
    site = Site.make(tmp_path)
    async with aiohttp.ClientSession() as session:
        await site.start()
        await _send(site, session, "one", 1)
        first = (await site.operator.status()).adapter
        taken = []

        real = cloud.backup._read

        async def read_then_end(*args: object) -> object:
            moment = await real(*args)  # type: ignore[arg-type]
            taken.append(moment.round)
            if len(taken) == 1:
                await _send(site, session, "two", 2)
                await site.tick()
                await _tidied(site)
            return moment

        monkeypatch.setattr(cloud.backup, "_read", read_then_end)
        found = await cloud.backup.back_up(site.config, site.folder / "emberlora.toml", tmp_path / "backup")
        assert taken == [0, 1]
        assert (found.round, found.updates) == (1, 0)
        blobs = tmp_path / "backup" / "data" / "blobs"
        assert list((blobs / UPDATES).iterdir()) == []
        assert [path.name for path in (blobs / OBJECTS).iterdir()] == [(await site.operator.status()).adapter]
        assert not (blobs / OBJECTS / first).exists()  # the first try had copied it
        await site.close()


async def _tidied(site: Site) -> None:
    for _ in range(100):
        if not any(name.startswith("updates/") for name in site.files()):
            return
        await asyncio.sleep(0.02)
    pytest.fail("updates of a final round are still there")


async def test_of_a_server_that_is_stopped(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    await site.start()
    await site.close()
    found = await cloud.backup.back_up(site.config, site.folder / "emberlora.toml", tmp_path / "new" / "backup")
    assert found.round == 0
    again = _restored(site, tmp_path / "new" / "backup", tmp_path / "again")
    await again.start()
    await again.close()


def _started(site: Site) -> None:
    async def once() -> None:
        await site.start()
        await site.close()

    asyncio.run(once())


def test_the_command_says_what_it_copied_and_keeps_it_from_others(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    _started(site)
    out = tmp_path / "backup"
    told = json.loads(back_up(site, out, "--json").stdout)
    assert (told["task"], told["round"], told["updates"], len(told["audit_head"])) == ("tiny", 0, 0, 64)
    for folder in (out, out / "data", out / "data" / "keys"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    for name in ("data/emberlora.sqlite3", "data/keys/plan.pem", "data/keys/operator.pem"):
        assert stat.S_IMODE((out / name).stat().st_mode) == 0o600, name
    assert "tiny at round 1, 0 updates of it; audit log's head " in back_up(site, tmp_path / "other").stdout


def test_what_cannot_be_copied_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    out = tmp_path / "out" / "backup"
    fresh = back_up(site, out)
    assert (fresh.exit_code, fresh.stderr.count("\n")) == (2, 1)
    assert "holds no rounds" in fresh.stderr
    _started(site)
    assert back_up(site, out).exit_code == 0
    before = sorted(path.name for path in out.rglob("*"))
    full = back_up(site, out)
    assert (full.exit_code, "is not empty" in full.stderr) == (2, True)
    assert sorted(path.name for path in out.rglob("*")) == before

    shutil.rmtree(site.config.data_path / "blobs")
    missing = back_up(site, tmp_path / "out" / "other")
    assert (missing.exit_code, ": not in " in missing.stderr) == (2, True)
    assert [path.name for path in out.parent.iterdir()] == ["backup"]

    with sqlite3.connect(site.config.data_path / "emberlora.sqlite3") as connection:
        connection.execute("UPDATE identity SET schema = schema + 1")
    connection.close()
    newer = back_up(site, tmp_path / "out" / "other")
    assert (newer.exit_code, "schema: expected" in newer.stderr) == (2, True)
    assert [path.name for path in out.parent.iterdir()] == ["backup"]
