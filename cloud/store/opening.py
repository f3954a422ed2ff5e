"""Whose a database is and of which version: its tables are made, taken, migrated, or refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import sqlalchemy as sa

from cloud.errors import DataSchemaError
from cloud.store import schema as t


@dataclass(frozen=True)
class Identity:
    """What a database belongs to; it is refused for anything else."""

    task: str
    bundle: str


def open_tables(engine: sa.Engine, identity: Identity, *, path: Path, migrate: bool) -> int:
    """Make the tables of a new database, or check that they are those of this version, task and bundle.

    Args:
        engine: Of one connection.
        identity: What the database must belong to.
        path: Of the database, for messages.
        migrate: Whether older tables are brought to this version, in one transaction: whatever stops it leaves them
            as they were.

    Returns:
        The schema that was found.

    Raises:
        DataSchemaError: they are of a newer version, of an older one that is not or cannot be migrated, or of another
            task or bundle.
    """
    with engine.begin() as connection:
        if not sa.inspect(connection).has_table(t.identity.name):
            t.metadata.create_all(connection)
            connection.execute(t.identity.insert().values(only=1, schema=t.IDENTITY_SCHEMA, **asdict(identity)))
            connection.execute(t.version.insert().values(version_num=str(t.SCHEMA)))
        row = connection.execute(sa.select(t.identity)).one()
        found: int = row.schema
        if found == t.IDENTITY_SCHEMA:
            found = int(connection.execute(sa.select(t.version.c.version_num)).scalar_one())
    if (row.task, row.bundle) != (identity.task, identity.bundle):
        raise DataSchemaError(
            f"{path}: belongs to another task or bundle: expected {identity.task} on "
            f"{identity.bundle[:12]}, got {row.task} on {row.bundle[:12]}"
        )
    if found != t.SCHEMA:
        _migrate(engine, found, path=path, migrate=migrate)
    return found


def _migrate(engine: sa.Engine, found: int, *, path: Path, migrate: bool) -> None:
    from cloud.store.migrating import OLDEST, migrate_tables  # takes 0.1 s, and is needed once

    said = f"{path}: schema: expected {t.SCHEMA}, got {found}"
    if found > t.SCHEMA:
        raise DataSchemaError(f"{said}: a newer version wrote it: upgrade this one")
    if found < OLDEST:
        raise DataSchemaError(f"{said}: older than {OLDEST} cannot be migrated: finish it with its own version")
    if not migrate:
        raise DataSchemaError(f"{said}: an older version wrote it: start `emberlora cloud serve` once to migrate it")
    migrate_tables(engine, found, path=path)
