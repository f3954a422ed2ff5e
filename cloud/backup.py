"""A copy of all that a task needs to go on, taken while its server runs or not.

The database first, as it is at one moment; then what that moment needs of the blobs. These are deleted when a round
ends, so a round that ends in between means: once more. The copy gets its name when it is whole and on the disk.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cloud.config import CONFIG_NAME, Config
from cloud.errors import DataError, DataMissingError
from cloud.keys import KEYS_FOLDER, NEXT_PLAN_KEY, OPERATOR_KEY, PLAN_KEY, PlanKeys, load_keys, private_key
from cloud.store import OBJECTS, UPDATES, Blobs, Database, Identity
from cloud.store.blobs import sync_path
from cloud.store.database import DATABASE_NAME
from cloud.store.snapshot import snapshot
from cloud.store.space import write_error
from edge_runtime.bundle import open_bundle

DATA_NAME = "data"  # in the copy, whatever the config calls it
_TRIES = 5


class Backup(msgspec.Struct, frozen=True):
    """What was copied: the round (from 0) that was open, its counted updates, and the audit log's newest digest."""

    task: str
    folder: str
    round: int
    updates: int
    audit_head: str


@dataclass(frozen=True)
class _Moment:
    """What a snapshot says, and the blobs without which a server cannot start on it."""

    round: int
    objects: frozenset[str]
    updates: tuple[str, ...]
    audit_head: str


async def back_up(config: Config, config_path: Path, out: Path) -> Backup:
    """Copy a task's config, keys, database and blobs to ``out``; nothing of the task changes.

    Args:
        config: The task's.
        config_path: The file it came from.
        out: Folder to make; it may be there if it is empty.

    Raises:
        DataError: ``out`` is not empty or cannot be written, or the data folder is not a task's; nothing is left then.
        BundleError: the bundle cannot be opened.
    """
    data = config.data_path
    if not (data / DATABASE_NAME).exists():
        raise DataMissingError(f"{data}: holds no rounds: start the task with `emberlora cloud serve` first")
    identity = Identity(config.task.name, open_bundle(config.bundle_path, verify=False).digest)
    load_keys(data / KEYS_FOLDER)  # keys that are missing are told of before anything is written
    staging: Path | None = None
    try:
        if out.exists() and any(out.iterdir()):
            raise DataError(f"{out}: is not empty")
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))  # of mode 0700
        (staging / DATA_NAME).mkdir(mode=0o700)
        _copy([(config_path, staging / CONFIG_NAME)])
        moment = await _copy_moment(data, staging / DATA_NAME, identity)
        for folder in (staging / DATA_NAME / KEYS_FOLDER, staging / DATA_NAME, staging):
            sync_path(folder)
        staging.replace(out)
        sync_path(out.parent)
    except OSError as error:
        raise write_error(f"{out}: cannot be written", error) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)  # it has its name when all went well
    return Backup(config.task.name, str(out), moment.round, len(moment.updates), moment.audit_head)


async def _copy_moment(data: Path, copy: Path, identity: Identity) -> _Moment:
    source, target = Blobs(data / "blobs"), Blobs(copy / "blobs")
    for tries_left in reversed(range(_TRIES)):
        snapshot(data / DATABASE_NAME, copy / DATABASE_NAME)
        try:
            _copy_keys(data / KEYS_FOLDER, copy / KEYS_FOLDER)
            moment = await _read(copy, identity)
            for kind, digests in ((OBJECTS, moment.objects), (UPDATES, moment.updates)):
                for digest in digests:
                    target.put(kind, source.get(kind, digest), digest)
        except DataMissingError:
            # Its round has ended meanwhile, or its plan key; or it is damaged, and will be the last time too.
            if not tries_left:
                raise
            continue
        break
    for kind, digests in ((OBJECTS, moment.objects), (UPDATES, moment.updates)):
        target.keep_only(kind, set(digests))  # an earlier try may have copied others
    sync_path(copy / DATABASE_NAME)
    return moment


async def _read(copy: Path, identity: Identity) -> _Moment:
    path, keys = copy / DATABASE_NAME, load_keys(copy / KEYS_FOLDER)
    database = Database(path)
    try:
        await database.call(database.open, identity)
        record = await database.call(database.last_round)
        if record is None:
            raise DataMissingError(f"{path}: holds no rounds: start the task with `emberlora cloud serve` first")
        open_updates = [] if record.state == "finished" else await database.call(database.updates_of, record.round)
        head = await database.call(database.log_head)
        known = PlanKeys.of(keys.plan, await database.call(database.key_statements))
    finally:
        await database.close()
    for needed in (known.signer(record.plan), known.public[-1]):  # a server that starts on the copy signs with them
        private_key(keys, needed)
    adapter = known.open(record.plan).plan.adapter
    return _Moment(
        round=record.round,
        objects=frozenset({adapter, record.master}),
        updates=tuple(update.receipt.digest for update in open_updates),
        audit_head=head,
    )


def _copy_keys(source: Path, target: Path) -> None:
    (target / NEXT_PLAN_KEY).unlink(missing_ok=True)  # an earlier try may have copied it
    with contextlib.suppress(FileNotFoundError):  # none waits
        _copy([(source / NEXT_PLAN_KEY, target / NEXT_PLAN_KEY)])
    _copy((source / name, target / name) for name in (PLAN_KEY, OPERATOR_KEY))


def _copy(pairs: Iterable[tuple[Path, Path]]) -> None:
    for source, target in pairs:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copy2(source, target)
        sync_path(target)
