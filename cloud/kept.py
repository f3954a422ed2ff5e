"""What is kept of a task, read from its data folder while the server may run."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from cloud.config import Config
from cloud.errors import DataMissingError
from cloud.keys import KEYS_FOLDER, PlanKeys, load_keys
from cloud.store import Database, Identity, RoundRecord
from cloud.store.database import DATABASE_NAME
from edge_runtime.bundle import Bundle, open_bundle


@dataclass(frozen=True)
class Kept:
    """The task's bundle, the keys that signed its plans, and every round in order."""

    bundle: Bundle
    keys: PlanKeys
    records: Sequence[RoundRecord]


@contextlib.asynccontextmanager
async def open_kept(config: Config) -> AsyncIterator[tuple[Database, Kept]]:
    """A task's rounds, and its rows for what else is asked of them.

    Raises:
        DataError: the data folder holds no task, or one of another version or bundle.
        BundleError: the bundle cannot be opened.
    """
    folder = config.data_path
    path = folder / DATABASE_NAME
    if not path.exists():
        raise DataMissingError(f"{folder}: holds no rounds: start the task with `emberlora cloud serve` first")
    bundle = open_bundle(config.bundle_path, verify=False)
    plan = load_keys(folder / KEYS_FOLDER).plan  # before the rows: whichever of the task's keys it is now, they name it
    database = Database(path)
    try:
        await database.call(database.open, Identity(config.task.name, bundle.digest))
        records = await database.call(database.rounds)
        keys = PlanKeys.of(plan, await database.call(database.key_statements))
        yield database, Kept(bundle, keys, records)
    finally:
        await database.close()


async def read_kept(config: Config) -> Kept:
    """Read a task's rounds.

    Raises:
        DataError, BundleError: see :func:`open_kept`.
    """
    async with open_kept(config) as (_, kept):
        return kept
