"""Rows in one SQLite file through one connection, which lives in one thread.

SQLite before 3.51.3 can damage a WAL database when two connections write or checkpoint at once, so there is one. Every
method is one transaction (``BEGIN IMMEDIATE``, synchronous=FULL): when it returns, its effect survives a power cut.
What the audit log records is written in the transaction that makes it so.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from cloud import audit
from cloud.errors import DataError
from cloud.store import log
from cloud.store import schema as t
from cloud.store.opening import Identity, open_tables
from cloud.store.records import (
    CapabilityRecord,
    Contributions,
    DeviceRecord,
    RevocationRecord,
    RoundRecord,
    TokenRecord,
    UpdateRecord,
)
from cloud.store.space import write_error
from edge_runtime.wire import Capability, KeyStatement, LocalMetrics, RoundStatus, UpdateReceipt

DATABASE_NAME = "emberlora.sqlite3"  # in the data folder
_BUSY_TIMEOUT_MS = 5_000  # somebody else may read: a backup, a replay
P = ParamSpec("P")
R = TypeVar("R")
Judge = Callable[[TokenRecord | None, DeviceRecord | None, Sequence[RevocationRecord]], DeviceRecord]
_HEARD = (
    t.devices.update()
    .where(t.devices.c.name == sa.bindparam("device"))
    .values(last_seen=sa.bindparam("seen"), bytes_down=t.devices.c.bytes_down + sa.bindparam("sent"))
)


class Database:
    """The rows of one task. Methods are synchronous; :meth:`call` runs them in the connection's thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="emberlora-db")
        self._engine = sa.create_engine(f"sqlite:///{path}", poolclass=StaticPool)
        sa.event.listen(self._engine, "connect", _on_connect)
        sa.event.listen(self._engine, "begin", _on_begin)

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one of the methods below in the database's thread.

        Raises:
            DataFullError: there is no room on the disk for what was to be written.
            DataError: the database cannot be read or written for another reason.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, functools.partial(function, *args, **kwargs))
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise write_error(f"{self._path}: database", error) from error

    async def close(self) -> None:
        """Close the connection and end the thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        self._thread.shutdown()

    def open(self, identity: Identity, *, migrate: bool = False) -> int:
        """Make, take or migrate the tables; the schema that was found. See :func:`cloud.store.opening.open_tables`.

        Raises:
            DataSchemaError: they are not of this version, task and bundle.
        """
        return open_tables(self._engine, identity, path=self._path, migrate=migrate)

    # Audit

    def begin_log(self, identity: Identity, now: float) -> None:
        """Start the audit log where there is none, at ``now`` (Unix seconds); before anything is written that it
        records."""
        with self._engine.begin() as connection:
            log.begin(connection, now, **asdict(identity))

    def log_head(self) -> str:
        """The digest of the newest entry of the audit log."""
        with self._engine.begin() as connection:
            last = log.last_link(connection)
        return audit.NOTHING if last is None else last.digest

    def audited(self) -> log.Audited:
        """The audit log and what it speaks about."""
        with self._engine.begin() as connection:
            return log.read(connection)

    def note_stop(self, round_: int, now: float) -> None:
        """Log that the operator asked for the end of the task."""
        with self._engine.begin() as connection:
            log.append(connection, now, audit.StopAsked(round_))

    def note_operator_key(self, change: audit.OperatorKeyChanged, now: float) -> None:
        """Log that the operator has another key, unless that is logged already."""
        with self._engine.begin() as connection:
            if not log.holds(connection, change):
                log.append(connection, now, change)

    # Plan keys

    def key_statements(self) -> tuple[KeyStatement, ...]:
        """Every change of the key that signs plans, in order."""
        columns = [t.plan_keys.c[name] for name in KeyStatement.__struct_fields__]
        with self._engine.begin() as connection:
            rows = connection.execute(sa.select(*columns).order_by(t.plan_keys.c.number))
            return tuple(KeyStatement(**row._mapping) for row in rows)

    def add_key_statement(self, number: int, new: KeyStatement, now: float) -> None:
        """Store the next change; ``number`` is how many there are before it."""
        with self._engine.begin() as connection:
            connection.execute(t.plan_keys.insert().values(number=number, **msgspec.structs.asdict(new)))
            log.append(connection, now, audit.PlanKeyChanged(new.old, new.new))

    # Rounds

    def last_round(self) -> RoundRecord | None:
        """The round opened last, or the finished state; None before the first."""
        query = sa.select(t.rounds).order_by(t.rounds.c.round.desc()).limit(1)
        with self._engine.begin() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _round(row)

    def rounds(self) -> list[RoundRecord]:
        """Every round that was opened, in order, and the finished state."""
        with self._engine.begin() as connection:
            return [_round(row) for row in connection.execute(sa.select(t.rounds).order_by(t.rounds.c.round))]

    def open_round(self, new: RoundRecord, *, adapter: str) -> None:
        """Store the first round; ``adapter`` is the one that its plan names."""
        with self._engine.begin() as connection:
            _insert_round(connection, new, adapter)

    def end_round(self, round_: int, *, summary: RoundStatus | None, new: RoundRecord, adapter: str) -> None:
        """Make a round final and open what follows, in one transaction.

        The round's private key is in no row any more then; :meth:`destroy_keys` takes it from the disk.

        Args:
            round_: The round that ends.
            summary: What it did, or None when its updates are discarded.
            new: The next round, or the finished state.
            adapter: The adapter that the plan of ``new`` names.
        """
        values: dict[str, Any] = {"round_key": None, "state": "discarded"}
        if summary is not None:
            values |= {"state": "applied", "summary": msgspec.json.encode(summary).decode()}
        with self._engine.begin() as connection:
            connection.execute(t.rounds.update().where(t.rounds.c.round == round_).values(values))
            log.append_all(connection, [(new.opened, entry) for entry in _ending(connection, round_, summary)])
            _insert_round(connection, new, adapter)

    def destroy_keys(self) -> None:
        """Empty the write-ahead log, where a page with the private key of a final round may lie, and the page's place.

        The rows are as they were, whether or not this succeeds.

        Raises:
            DataError: somebody reads the database at this moment, and so keeps the log as it is.
        """
        raw = self._engine.raw_connection()  # SQLAlchemy's own begins a transaction, which forbids this
        try:
            cursor = raw.cursor()
            cursor.execute("PRAGMA busy_timeout=0")  # to wait for a backup here would keep updates waiting
            busy, _, _ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
        finally:
            raw.close()
        if busy:
            raise DataError(f"{self._path}: the key of a final round stays in the log until nobody reads any more")

    def move_deadline(self, round_: int, deadline: float) -> None:
        """Store a later deadline."""
        with self._engine.begin() as connection:
            connection.execute(t.rounds.update().where(t.rounds.c.round == round_).values(deadline=deadline))

    def history(self) -> tuple[RoundStatus, ...]:
        """Every applied round, in order."""
        query = sa.select(t.rounds.c.summary).where(t.rounds.c.state == "applied").order_by(t.rounds.c.round)
        with self._engine.begin() as connection:
            return tuple(msgspec.json.decode(text, type=RoundStatus) for text in connection.scalars(query))

    # Updates

    def add_updates(self, updates: Sequence[UpdateRecord]) -> None:
        """Count updates, all of them or none; their blobs are durable already."""
        with self._engine.begin() as connection:
            connection.execute(t.updates.insert(), [_update_row(update) for update in updates])
            log.append_all(connection, [(update.received, _counted(update.receipt)) for update in updates])

    def updates_of(self, round_: int) -> list[UpdateRecord]:
        """The counted updates of a round in the order they came."""
        return self._updates(sa.select(t.updates).where(t.updates.c.round == round_).order_by(t.updates.c.received))

    def updates(self) -> list[UpdateRecord]:
        """The counted updates of all rounds."""
        return self._updates(sa.select(t.updates).order_by(t.updates.c.round, t.updates.c.received))

    def receipt_of(self, round_: int, device: str) -> UpdateReceipt | None:
        """The receipt a device got for a round."""
        query = sa.select(t.updates).where(t.updates.c.round == round_, t.updates.c.device == device)
        found = self._updates(query)
        return found[0].receipt if found else None

    def last_updates(self) -> list[UpdateRecord]:
        """The newest counted update of every device."""
        newest = sa.select(t.updates.c.device, sa.func.max(t.updates.c.round)).group_by(t.updates.c.device)
        return self._updates(sa.select(t.updates).where(sa.tuple_(t.updates.c.device, t.updates.c.round).in_(newest)))

    def set_aside(self) -> frozenset[tuple[int, str]]:
        """Round and device of every counted update that is in no adapter, because it was far from the others."""
        return frozenset(
            (summary.round, outlier.device)
            for summary in self.history()
            for outlier in summary.outliers
            if not outlier.kept
        )

    def contributions(self) -> dict[str, Contributions]:
        """What every device gave that gave anything, by its name."""
        aside = Counter(device for _, device in self.set_aside())
        applied = sa.func.sum(sa.case((t.rounds.c.state == "applied", 1), else_=0))
        query = (
            sa.select(t.updates.c.device, applied, sa.func.sum(t.updates.c.bytes))
            .join(t.rounds, t.rounds.c.round == t.updates.c.round)
            .group_by(t.updates.c.device)
        )
        with self._engine.begin() as connection:
            return {
                device: Contributions(count - aside[device], aside[device], size)
                for device, count, size in connection.execute(query)
            }

    def _updates(self, query: sa.Select[Any]) -> list[UpdateRecord]:
        with self._engine.begin() as connection:
            return [
                UpdateRecord(
                    UpdateReceipt(device=row.device, round=row.round, digest=row.digest, weight=row.weight),
                    row.bytes,
                    row.received,
                    msgspec.json.decode(row.metrics, type=LocalMetrics),
                )
                for row in connection.execute(query)
            ]

    # Devices

    def devices(self) -> list[DeviceRecord]:
        """Every device that was ever enrolled, by name."""
        with self._engine.begin() as connection:
            return [_device(row) for row in connection.execute(sa.select(t.devices).order_by(t.devices.c.name))]

    def add_token(self, token: TokenRecord, now: float) -> None:
        """Store a new token."""
        with self._engine.begin() as connection:
            connection.execute(t.tokens.insert().values(asdict(token)))
            log.append(connection, now, audit.TokenMade(token.device, token.digest, int(token.expires)))

    def enrol(self, token_digest: str, device: str, judge: Judge) -> DeviceRecord:
        """Use up a token for a device in one transaction, so that of two racing devices one wins.

        Args:
            token_digest: SHA-256 of the token's secret, hex.
            device: The name asked for.
            judge: Given the token and the device of that name, if there are such, and all that were revoked, gives the
                record to keep or raises a refusal, which then changes nothing.
        """
        find_token = sa.select(t.tokens).where(t.tokens.c.digest == token_digest)
        find_device = sa.select(t.devices).where(t.devices.c.name == device)
        with self._engine.begin() as connection:
            token = connection.execute(find_token).one_or_none()
            known = connection.execute(find_device).one_or_none()
            found = None if token is None else _token(token), None if known is None else _device(known)
            record = judge(*found, _revocations(connection))
            row = asdict(record)
            if known is None:
                connection.execute(t.devices.insert().values(row))
            else:
                connection.execute(t.devices.update().where(t.devices.c.name == device).values(row))
            used = t.tokens.update().where(t.tokens.c.digest == token_digest)
            connection.execute(used.values(used_by=record.signing_key))
            if known is None or record != _device(known):  # else its first answer was lost, and it asks again
                enrolled = audit.DeviceEnrolled(device, token_digest, record.signing_key)
                log.append(connection, record.enrolled, enrolled)
        return record

    def rekey(self, device: str, old: str, new: str, now: float) -> bool:
        """Replace a device's key (both public, hex) in one transaction; none may change to the old one.

        Returns:
            False when nothing was changed: the old key is not the device's, or the new one is, or was, somebody's.
        """
        known = t.devices.update().where(t.devices.c.name == device, t.devices.c.signing_key == old)
        with self._engine.begin() as connection:
            for table in (t.devices, t.retired_keys, t.revocations):
                if connection.execute(sa.select(table).where(table.c.signing_key == new)).first() is not None:
                    return False
            if not connection.execute(known.values(signing_key=new)).rowcount:
                return False
            connection.execute(t.retired_keys.insert().values(signing_key=old, device=device))
            log.append(connection, now, audit.DeviceRekeyed(device, new))
        return True

    def leave(self, device: str, now: float, *, by: str) -> None:
        """Note that a device left; what it measured of itself is forgotten, as another machine may take its name.

        ``by`` is whose request it was: the device's own or the operator's.
        """
        with self._engine.begin() as connection:
            connection.execute(t.capabilities.delete().where(t.capabilities.c.device == device))
            connection.execute(t.devices.update().where(t.devices.c.name == device).values(left_at=now))
            log.append(connection, now, audit.DeviceLeft(device, by))

    def revoke(self, new: RevocationRecord) -> RevocationRecord:
        """Note that a device is refused for good; what it measured of itself is forgotten.

        Returns:
            ``new``, or what was noted before, which then stays.
        """
        with self._engine.begin() as connection:
            old = connection.execute(sa.select(t.revocations).where(t.revocations.c.device == new.device)).one_or_none()
            if old is not None:
                return RevocationRecord(**old._mapping)
            connection.execute(t.capabilities.delete().where(t.capabilities.c.device == new.device))
            # Its key as it is now: the device may have replaced it a moment ago.
            key = sa.select(t.devices.c.signing_key).where(t.devices.c.name == new.device)
            new = replace(new, signing_key=connection.execute(key).scalar_one())
            connection.execute(t.revocations.insert().values(asdict(new)))
            log.append(connection, new.revoked, audit.DeviceRevoked(new.device, new.signing_key))
        return new

    def revocations(self) -> list[RevocationRecord]:
        """Every device that is refused for good."""
        with self._engine.begin() as connection:
            return _revocations(connection)

    def put_capability(self, device: str, record: CapabilityRecord) -> None:
        """Keep what a device measured of itself in place of what it said before."""
        text = msgspec.json.encode(record.capability).decode()
        with self._engine.begin() as connection:
            connection.execute(t.capabilities.delete().where(t.capabilities.c.device == device))
            connection.execute(t.capabilities.insert().values(device=device, told=record.told, capability=text))

    def capabilities(self) -> dict[str, CapabilityRecord]:
        """What devices measured of themselves, by name; those that never said so are left out."""
        with self._engine.begin() as connection:
            rows = connection.execute(sa.select(t.capabilities)).all()
        return {
            row.device: CapabilityRecord(msgspec.json.decode(row.capability, type=Capability), row.told) for row in rows
        }

    def note(
        self,
        traffic: Iterable[tuple[str, float, int]],
        arrivals: Mapping[tuple[int, str], float],
        refusals: Mapping[tuple[str, str], int],
        now: float,
    ) -> None:
        """Keep figures for people, all of them or none, and log which refusals are new in the open round.

        Args:
            traffic: (device, last seen, further bytes sent to it).
            arrivals: How many seconds the body of a counted update took to arrive, by round and device.
            refusals: Further refused updates, by device and name of the problem.
            now: Unix seconds.
        """
        with self._engine.begin() as connection:
            heard = [{"device": device, "seen": seen, "sent": sent} for device, seen, sent in traffic]
            if heard:
                connection.execute(_HEARD, heard)
            came = [{"round": round_, "device": name, "seconds": took} for (round_, name), took in arrivals.items()]
            if came:
                connection.execute(t.arrivals.insert(), came)
            for (device, problem), count in refusals.items():
                row = t.refusals.c.device == device, t.refusals.c.problem == problem
                more = t.refusals.update().where(*row).values(updates=t.refusals.c.updates + count)
                if not connection.execute(more).rowcount:
                    connection.execute(t.refusals.insert().values(device=device, problem=problem, updates=count))
                log.append_refused(connection, now, device, problem)

    def arrivals(self) -> dict[tuple[int, str], float]:
        """Seconds by round and device; see :meth:`note`."""
        with self._engine.begin() as connection:
            return {(row.round, row.device): row.seconds for row in connection.execute(sa.select(t.arrivals))}

    def refusals(self) -> dict[str, dict[str, int]]:
        """How many updates of a device were refused, by the name of the problem."""
        found: dict[str, dict[str, int]] = {}
        with self._engine.begin() as connection:
            for row in connection.execute(sa.select(t.refusals)):
                found.setdefault(row.device, {})[row.problem] = row.updates
        return found


def _round(row: sa.Row[Any]) -> RoundRecord:
    return RoundRecord(**{field.name: getattr(row, field.name) for field in fields(RoundRecord)})


def _insert_round(connection: sa.Connection, new: RoundRecord, adapter: str) -> None:
    connection.execute(t.rounds.insert().values(asdict(new)))
    connection.execute(t.refusals_logged.delete())  # it is another round now
    digest = hashlib.sha256(new.plan).hexdigest()
    log.append(connection, new.opened, audit.PlanSigned(new.round, digest, adapter, new.state == "finished"))


def _ending(connection: sa.Connection, round_: int, summary: RoundStatus | None) -> list[audit.Entry]:
    if summary is not None:
        outlying = [audit.outlying(round_, outlier) for outlier in summary.outliers]
        return [*outlying, audit.RoundApplied(round_, summary.devices, summary.weight, summary.adapter)]
    counted = sa.select(sa.func.count()).select_from(t.updates).where(t.updates.c.round == round_)
    return [audit.RoundDiscarded(round_, connection.scalar(counted) or 0)]


def _update_row(update: UpdateRecord) -> dict[str, Any]:
    return msgspec.structs.asdict(update.receipt) | {
        "bytes": update.bytes,
        "received": update.received,
        "metrics": msgspec.json.encode(update.metrics).decode(),
    }


def _counted(receipt: UpdateReceipt) -> audit.Entry:
    return audit.UpdateCounted(receipt.round, receipt.device, receipt.digest, receipt.weight)


def _device(row: sa.Row[Any]) -> DeviceRecord:
    return DeviceRecord(row.name, row.signing_key, row.enrolled, row.last_seen, row.left_at, row.bytes_down)


def _revocations(connection: sa.Connection) -> list[RevocationRecord]:
    query = sa.select(t.revocations).order_by(t.revocations.c.device)
    return [RevocationRecord(**row._mapping) for row in connection.execute(query)]


def _token(row: sa.Row[Any]) -> TokenRecord:
    return TokenRecord(row.digest, row.device, row.expires, row.used_by)


def _on_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy begins and commits, not the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")


def _on_begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
