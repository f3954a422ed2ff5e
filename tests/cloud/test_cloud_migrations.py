"""Folders of older versions: migrated when the server starts on them, left alone by everything else.

``schema_3`` holds what two such versions wrote: ``first`` was the first of schema 3 (commit 8768e2f), ``late`` the last
(266f88f), which had added its newer tables when it started. Both were stopped in round 1 of 3, with one of two updates
there, by the ``Site`` and ``Device`` of their own tests; their keys are made of the seeds below.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import aiohttp
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from click.testing import CliRunner
from cloud_fleet import Clock, Device, Site, values_for
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloud import events
from cloud.commands import cloud
from cloud.errors import DataError, DataSchemaError
from cloud.keys import KEYS_FOLDER, load_keys
from cloud.store import Database, Identity, migrations
from cloud.store import schema as t
from cloud.store.database import DATABASE_NAME
from cloud.store.migrating import alembic_config

OLD = Path(__file__).parent / "schema_3"
SEEDS = {"plan": 1, "operator": 2, "one": 3, "two": 4}
HERE = Path(migrations.__file__).parent


def key(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([SEEDS[name]]) * 32)


@pytest.fixture(params=["first", "late"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    """A site whose data folder an older version wrote; no server runs on it."""
    site = Site.make(tmp_path)
    data = site.config.data_path
    for name in ("plan", "operator"):
        pem = key(name).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (data / KEYS_FOLDER / f"{name}.pem").write_bytes(pem)
    shutil.copytree(OLD / "blobs", data / "blobs")
    with closing(sqlite3.connect(data / DATABASE_NAME)) as connection:
        connection.executescript((OLD / f"{request.param}.sql").read_text())
    return site


def database_path(site: Site) -> Path:
    return site.config.data_path / DATABASE_NAME


def dump(site: Site) -> list[str]:
    with closing(sqlite3.connect(database_path(site))) as connection:
        return list(connection.iterdump())


def identity(site: Site) -> Identity:
    return Identity(site.config.task.name, site.bundle.digest)


async def open_database(site: Site, *, migrate: bool = True) -> int:
    database = Database(database_path(site))
    try:
        return await database.call(database.open, identity(site), migrate=migrate)
    finally:
        await database.close()


def known(site: Site, session: aiohttp.ClientSession, name: str) -> Device:
    """A device that enrolled with the older version."""
    device = Device(site, session, name, key=key(name))
    device.plan_key = load_keys(site.config.data_path / KEYS_FOLDER).plan.public_key()
    return device


async def put(device: Device, round_: int, seed: int) -> None:
    signed = await device.plan(after=round_ - 1)
    assert signed is not None
    assert signed.plan.round == round_
    sealed = device.seal(signed, device.frame(signed, values_for(device.site, signed, seed)))
    assert (await device.put(signed, sealed)).status == 201


async def test_an_old_task_goes_on_in_its_round(old: Site, tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """To the adapter that this version makes of the same updates, bit for bit."""
    await old.start()
    assert old.events[0] == events.DatabaseMigrated(3, t.SCHEMA)
    assert (await old.operator.status()).received == 1
    await put(known(old, session, "two"), 1, seed=8)
    await old.tick()
    for name, seed in (("one", 9), ("two", 10)):
        await put(known(old, session, name), 2, seed)
    await old.tick()
    ended = await old.operator.status()
    await old.restart()
    assert [event for event in old.events if isinstance(event, events.DatabaseMigrated)] == [old.events[0]]
    await old.close()
    for asked in (("audit", "verify"), ("replay",), ("audit", "trace", ended.adapter)):
        result = await asyncio.to_thread(CliRunner().invoke, cloud, [*asked, "--config", str(old.folder)])
        assert result.exit_code == 0, result.output

    new = Site.make(tmp_path / "new")
    await new.start()
    one, two = [await new.device(session, name) for name in ("one", "two")]
    for round_, seeds in enumerate([(0, 1), (7, 8), (9, 10)]):
        await put(one, round_, seeds[0])
        await put(two, round_, seeds[1])
        await new.tick()
    assert (ended.state, ended.adapter) == ("finished", (await new.operator.status()).adapter)
    await new.close()


async def test_it_has_the_tables_of_a_new_one_then(old: Site, tmp_path: Path) -> None:
    assert await open_database(old) == 3
    assert await open_database(old) == t.SCHEMA
    new = Site.make(tmp_path / "new")
    assert await open_database(new) == t.SCHEMA
    assert tables(old) == tables(new)


def tables(site: Site) -> set[str]:
    """Their definitions, but for white space."""
    with closing(sqlite3.connect(database_path(site))) as connection:
        return {" ".join(sql.split()) for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql > ''")}


def test_revisions_lead_to_what_the_code_expects(tmp_path: Path) -> None:
    """From nothing to the newest; whoever changes a table without a revision is told here."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'empty'}")
    with engine.begin() as connection:
        config = alembic_config(connection)
        assert ScriptDirectory.from_config(config).get_heads() == [str(t.SCHEMA)]
        command.upgrade(config, "head")
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, t.metadata) == []
    engine.dispose()


async def test_what_stops_a_migration_changes_nothing(old: Site) -> None:
    """At every statement; the next start migrates."""
    before, statements = dump(old), 0
    while True:
        with failing(statements) as failed:
            try:
                assert await open_database(old) == 3
            except DataError:
                assert failed
                assert dump(old) == before
            else:
                break
        statements += 1
    assert statements > 10
    assert await open_database(old) == t.SCHEMA


@contextmanager
def failing(after: int) -> Iterator[list[str]]:
    """Statements of all databases fail after so many; those that did."""
    left, failed = [after], list[str]()

    def execute(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            failed.append(statement)
            raise sqlite3.OperationalError("disk I/O error")

    sa.event.listen(sa.Engine, "before_cursor_execute", execute)
    try:
        yield failed
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", execute)


@pytest.mark.parametrize("asked", [("audit", "verify"), ("replay",), ("backup", "--out", "copy"), ("plans",)])
def test_only_the_server_migrates(old: Site, asked: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old.folder)
    before = dump(old)
    result = CliRunner().invoke(cloud, [*asked, "--config", str(old.folder)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert f"expected {t.SCHEMA}, got 3: an older version wrote it: start `emberlora cloud serve` once" in result.stderr
    assert dump(old) == before
    assert not (old.folder / "copy").exists()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE identity SET schema = 2", r"got 2: older than 3 cannot be migrated: finish it with its own version"),
        ("UPDATE identity SET schema = 99", r"got 99: a newer version wrote it: upgrade this one"),
        ("UPDATE identity SET task = 'other'", "another task or bundle"),  # and is not migrated before that is known
    ],
)
async def test_what_cannot_be_migrated(old: Site, statement: str, message: str) -> None:
    with closing(sqlite3.connect(database_path(old))) as connection, connection:
        connection.execute(statement)
    before = dump(old)
    with pytest.raises(DataSchemaError, match=message):
        await old.start()
    assert dump(old) == before


def test_a_newer_version_is_told_apart(old: Site) -> None:
    """By Alembic's table: ``identity.schema`` stays as it is from 4 on."""
    with closing(sqlite3.connect(database_path(old))) as connection, connection:
        connection.executescript("UPDATE identity SET schema = 4; CREATE TABLE alembic_version (version_num);")
        connection.execute("INSERT INTO alembic_version VALUES (?)", (str(t.SCHEMA + 1),))
    result = CliRunner().invoke(cloud, ["serve", "--config", str(old.folder)])
    assert result.exit_code == 2
    assert f"expected {t.SCHEMA}, got {t.SCHEMA + 1}: a newer version wrote it: upgrade this one" in result.stderr


REBUILT = """
from alembic import op
import sqlalchemy as sa
revision = "{number}"
down_revision = "{before}"

def upgrade():
    with op.batch_alter_table("rounds", recreate="always") as rounds:
        rounds.add_column(sa.Column("note", sa.Text))
    {more}
"""


@pytest.mark.parametrize("more", ["", "op.execute('DELETE FROM devices')"])
async def test_a_table_that_others_point_to_can_be_made_anew(
    old: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    """With its rows and theirs; a revision that leaves rows pointing to nothing changes nothing."""
    scripts = shutil.copytree(HERE, tmp_path / "50 %")
    text = REBUILT.format(number=t.SCHEMA + 1, before=t.SCHEMA, more=more)
    (scripts / "versions" / "r_next.py").write_text(text)
    monkeypatch.setattr(migrations, "__file__", str(scripts / "__init__.py"))
    monkeypatch.setattr(t, "SCHEMA", t.SCHEMA + 1)
    before = dump(old)
    if more:
        with pytest.raises(DataSchemaError, match="a row of updates names one of devices that is not there"):
            await open_database(old)
        assert dump(old) == before
        return
    await open_database(old)
    rows = [line for line in dump(old) if line.startswith(('INSERT INTO "updates"', 'INSERT INTO "devices"'))]
    assert rows == [line for line in before if line.startswith(('INSERT INTO "updates"', 'INSERT INTO "devices"'))]
    assert sum('INSERT INTO "rounds"' in line and line.endswith(",NULL);") for line in dump(old)) == 2


def test_the_clock_of_the_old_folder_is_the_sites() -> None:
    """Its round is open at the time that the tests begin with; otherwise it would be closed for its deadline."""
    assert f",{Clock.now}," in (OLD / "first.sql").read_text()
