"""From the tables of an older version to those of this one, by the revisions in :mod:`cloud.store.migrations`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from cloud.errors import DataSchemaError
from cloud.store import migrations

OLDEST = 3  # schemas before it are of no release


def migrate_tables(engine: sa.Engine, found: int, *, path: Path) -> None:
    """Bring the tables of schema ``found`` to this version's, all at once or not at all.

    Args:
        engine: Of one connection.
        found: ``OLDEST`` or newer.
        path: Of the database, for messages.

    Raises:
        DataSchemaError: rows would point to others that are not there.
    """
    with _no_foreign_keys(engine), engine.begin() as connection:
        config = alembic_config(connection)
        if not sa.inspect(connection).has_table("alembic_version"):
            command.stamp(config, str(found))
        command.upgrade(config, "head")
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            table, _, named, _ = broken
            raise DataSchemaError(
                f"{path}: cannot be migrated: a row of {table} names one of {named} that is not there"
            )


def alembic_config(connection: sa.Connection) -> Config:
    """What Alembic's commands need to find the revisions and, by ``env.py``, the database."""
    config = Config()
    folder = Path(str(migrations.__file__)).parent
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@contextmanager
def _no_foreign_keys(engine: sa.Engine) -> Iterator[None]:
    """SQLite changes most tables by making another one and dropping the first, which would take what points to it."""
    with engine.connect() as connection:
        raw = connection.connection.dbapi_connection
    assert raw is not None
    raw.execute("PRAGMA foreign_keys=OFF")  # means nothing within a transaction
    try:
        yield
    finally:
        raw.execute("PRAGMA foreign_keys=ON")
