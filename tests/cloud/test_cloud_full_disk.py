"""A data folder on a disk that is full: refused by name, nothing changed, and it goes on by itself once there is room.

The disk is a real one of two megabytes, which only root may mount; the libraries' words for "full" are checked without.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import sqlalchemy as sa
from cloud_fleet import Device, Site, values_for
from obstore.exceptions import GenericError

from cloud import events
from cloud.errors import DataError, DataFullError, ServerRefusedError
from cloud.store import OBJECTS, UPDATES, Blobs, Database
from cloud.store.blobs import Kind
from cloud.store.space import write_error


class Disk:
    """A small disk that can be filled to the last byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.filler = folder / "filler"

    def fill(self) -> None:
        with self.filler.open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):  # until there is no room for so much
                    while True:
                        file.write(b"\0" * size)

    def make_room(self) -> None:
        self.filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here: that takes root on Linux")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
async def site(disk: Disk) -> AsyncIterator[Site]:
    site = Site.make(disk.folder)
    await site.start()
    yield site
    await site.close()


def contribution(device: Device, signed: object, seed: int) -> bytes:
    return device.seal(signed, device.frame(signed, values_for(device.site, signed, seed)))  # type: ignore[arg-type]


async def test_an_update_that_does_not_fit_is_refused_and_counts_later(
    disk: Disk, site: Site, session: aiohttp.ClientSession
) -> None:
    """507 with a hint, no trace in memory or on disk; the same bytes count once there is room, and the round ends."""
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    assert signed is not None
    sealed = contribution(one, signed, 1)
    disk.fill()
    for _ in range(3):
        refused = await one.put(signed, sealed)
        assert (refused.status, refused.problem(), refused.headers["Retry-After"]) == (507, "StorageFullError", "60")
    assert b"nothing of this was kept" in refused.body
    assert str(disk.folder).encode() not in refused.body
    assert (await site.operator.status()).received == 0
    assert list((site.config.data_path / "blobs" / UPDATES).iterdir()) == []
    disk.make_room()
    assert (await one.put(signed, sealed)).status == 201
    assert (await two.put(signed, contribution(two, signed, 2))).status == 201
    after = await one.plan(after=0)
    assert after is not None
    assert after.plan.round == 1


async def test_a_round_that_does_not_fit_is_applied_once_there_is_room(
    disk: Disk, site: Site, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both updates are counted; the adapter that they make has no room at first. It is tried again by itself."""
    devices = [await site.device(session, name) for name in ("one", "two")]
    signed = await devices[0].plan()
    assert signed is not None
    tried = asyncio.Event()
    real = Blobs.write

    def write(self: Blobs, kind: Kind, data: bytes, digest: str | None = None) -> str:
        if kind == OBJECTS and not tried.is_set():
            disk.fill()  # between the last update and the adapter
        try:
            return real(self, kind, data, digest)
        except DataFullError:
            loop.call_soon_threadsafe(tried.set)
            raise

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(Blobs, "write", write)
    for number, device in enumerate(devices):
        assert (await device.put(signed, contribution(device, signed, number))).status == 201
    await asyncio.wait_for(tried.wait(), 10)
    status = await site.operator.status()
    assert (status.round, status.received) == (0, 2)
    disk.make_room()
    after = await devices[0].plan(after=0)
    assert after is not None
    assert (after.plan.round, after.plan.state) == (1, "train")
    failed = [event for event in site.events if isinstance(event, events.WorkFailed)]
    assert "No space left" in failed[0].detail


async def test_a_round_that_ended_as_the_disk_became_full_is_final(
    disk: Disk, site: Site, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key cannot be taken from the disk yet: the next round is open all the same, and the key goes once it can."""
    devices = [await site.device(session, name) for name in ("one", "two")]
    signed = await devices[0].plan()
    assert signed is not None
    real = Database.destroy_keys

    def destroy_keys(self: Database) -> None:
        disk.fill()
        real(self)

    monkeypatch.setattr(Database, "destroy_keys", destroy_keys)
    with sqlite3.connect(site.config.data_path / "emberlora.sqlite3") as database:
        (key,) = database.execute("SELECT round_key FROM rounds").fetchone()
    database.close()
    for number, device in enumerate(devices):
        assert (await device.put(signed, contribution(device, signed, number))).status == 201
    after = await devices[0].plan(after=0)
    assert after is not None
    assert after.plan.round == 1
    assert key_is_kept(site, key)
    failed = [event for event in site.events if isinstance(event, events.WorkFailed)]
    assert "database or disk is full" in failed[0].detail
    monkeypatch.undo()
    disk.make_room()
    for _ in range(100):
        if not key_is_kept(site, key):
            break
        await asyncio.sleep(0.05)
    assert not key_is_kept(site, key)
    assert (await site.operator.status()).round == 1


def key_is_kept(site: Site, key: bytes) -> bool:
    """Whether a file of the data folder has it."""
    return any(key in path.read_bytes() for path in site.config.data_path.glob("emberlora.sqlite3*"))


async def test_a_server_ends_on_a_full_disk_and_starts_once_there_is_room(
    disk: Disk, site: Site, session: aiohttp.ClientSession
) -> None:
    """Nothing that was acknowledged is lost; what it sent to devices, a figure for people, is kept for later."""
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    assert signed is not None
    assert (await one.put(signed, contribution(one, signed, 1))).status == 201
    disk.fill()
    before = (await site.operator.status()).bytes_down
    assert await one.plan() is not None
    assert (await site.operator.status()).bytes_down == before
    disk.make_room()
    assert (await site.operator.status()).bytes_down > before
    disk.fill()
    with pytest.raises(DataFullError, match=r"server\.url: cannot be written: .*No space left on device"):
        await site.restart()
    disk.make_room()
    await site.start()
    assert (await site.operator.status()).received == 1
    assert (await two.put(signed, contribution(two, signed, 2))).status == 201
    after = await one.plan(after=0)
    assert after is not None
    assert after.plan.round == 1


async def test_enrolment_on_a_full_disk_is_refused_by_name(
    disk: Disk, site: Site, session: aiohttp.ClientSession
) -> None:
    """The database has no room for a token; afterwards there is, and the device that enrols is the only one."""
    disk.fill()
    refused = ""
    for number in range(200):  # the write-ahead log has some room in its last page
        try:
            await site.operator.make_token(f"device-{number}", 60)
        except ServerRefusedError as error:
            refused = str(error)
    assert "disk is full" in refused
    disk.make_room()
    one = await site.device(session, "one")
    assert await one.plan() is not None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DataFullError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DataFullError),
        (OSError(errno.EIO, "Input/output error"), DataError),
        (GenericError(f"Generic LocalFileSystem error: {os.strerror(errno.ENOSPC)} (os error 28)"), DataFullError),
        (GenericError("Generic LocalFileSystem error: Permission denied (os error 13)"), DataError),
        (sa.exc.OperationalError("s", {}, sqlite3.OperationalError("database or disk is full")), DataFullError),
        (sa.exc.OperationalError("s", {}, sqlite3.OperationalError("database is locked")), DataError),
    ],
)
def test_full_is_told_from_other_failures(error: Exception, kind: type[DataError]) -> None:
    found = write_error("blob 12: cannot be stored", error)
    assert type(found) is kind
    assert str(found).startswith("blob 12: cannot be stored: ")
    assert "\n" not in str(found)
