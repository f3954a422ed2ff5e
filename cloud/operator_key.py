"""Replacing the key that the operator's requests are signed with, while no server runs on the folder.

It needs no statement of the old key, as that of plans does: only commands on the server's own disk use it, and whoever
may write there may do anything. The new key is durable beside the old one before the log has it, and takes its place
after that; a change that was interrupted is gone on with, with the same key.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud.audit import OperatorKeyChanged
from cloud.config import Config
from cloud.errors import DataMissingError
from cloud.keys import KEYS_FOLDER, NEXT_OPERATOR_KEY, OPERATOR_KEY, load_key, load_keys, write_new
from cloud.lock import FolderLock
from cloud.store import Database, Identity
from cloud.store.blobs import sync_path
from cloud.store.database import DATABASE_NAME
from cloud.store.space import write_error


class OperatorKeyRotation(msgspec.Struct, frozen=True):
    """Public halves in hex; ``resumed``: the change had begun before and is finished now."""

    old: str
    new: str
    resumed: bool


async def rotate(config: Config, identity: Identity, *, now: float) -> OperatorKeyRotation:
    """Make a new operator key, log it, and let it take the place of the old one, which is gone then.

    Args:
        config: The task's.
        identity: What its database must be of.
        now: Unix seconds.

    Raises:
        DataLockedError: a server runs on the folder.
        DataMissingError: the task has no keys, or no database yet.
        DataError: the disk or the database does not take it; the next call goes on from there.
    """
    data, folder = config.data_path, config.data_path / KEYS_FOLDER
    if not (data / DATABASE_NAME).exists():
        raise DataMissingError(f"{data}: holds no rounds: start the task with `emberlora cloud serve` first")
    lock = FolderLock(data)
    database = Database(data / DATABASE_NAME)
    try:
        old = _public(load_keys(folder).operator)
        await database.call(database.open, identity)
        key, resumed = _next(folder)
        new = _public(key)
        await database.call(database.note_operator_key, OperatorKeyChanged(old, new), now)
        try:
            (folder / NEXT_OPERATOR_KEY).replace(folder / OPERATOR_KEY)
            sync_path(folder)
        except OSError as error:
            raise write_error(f"{folder}: the operator's key cannot be replaced", error) from error
    finally:
        await database.close()
        lock.release()
    return OperatorKeyRotation(old, new, resumed)


def _next(folder: Path) -> tuple[Ed25519PrivateKey, bool]:
    """The key that follows, in a file of its own, and whether an earlier change left it."""
    path = folder / NEXT_OPERATOR_KEY
    with contextlib.suppress(DataMissingError):  # none, or one of which the writing was interrupted
        return load_key(path), True
    key = Ed25519PrivateKey.generate()
    try:
        path.unlink(missing_ok=True)
        write_new(path, key)
        sync_path(folder)
    except OSError as error:
        raise write_error(f"{path}: the key cannot be written", error) from error
    return key, False


def _public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()
