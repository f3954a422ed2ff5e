"""The audit log's rows. :func:`append` runs in the transaction of what it records, so neither is ever there alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import msgspec
import sqlalchemy as sa

from cloud import audit
from cloud.store import schema as t
from edge_runtime.wire import RoundStatus

_UPDATE = (t.updates.c.round, t.updates.c.device, t.updates.c.digest, t.updates.c.weight)
_ROUND = (t.rounds.c.round, t.rounds.c.plan, t.rounds.c.state, t.rounds.c.summary)


@dataclass(frozen=True)
class Audited:
    """The log and what it speaks about, as they were at one instant."""

    links: tuple[audit.Link, ...]
    facts: frozenset[str]


def begin(connection: sa.Connection, now: float, *, task: str, bundle: str) -> None:
    """Write entry 0 if the log is empty; ``now`` is Unix seconds."""
    if last_link(connection) is not None:
        return
    if any(connection.execute(sa.select(table).limit(1)).first() for table in (t.rounds, t.devices, t.tokens)):
        found = {*_facts(connection)} - {audit.task_fact(task, bundle)}
        append(connection, now, audit.LogTakenUp(task, bundle, len(found), audit.found_digest(found)))
    else:
        append(connection, now, audit.LogBegun(task, bundle))


def append(connection: sa.Connection, now: float, entry: audit.Entry) -> None:
    """Write the next entry; ``now`` is Unix seconds."""
    append_all(connection, [(now, entry)])


def append_all(connection: sa.Connection, entries: Iterable[tuple[float, audit.Entry]]) -> None:
    """Write the next entries in order, each with its Unix seconds."""
    last, links = last_link(connection), list[audit.Link]()
    for now, entry in entries:
        last = audit.follow(last, now=now, entry=entry)
        links.append(last)
    connection.execute(t.audit.insert(), [asdict(link) for link in links])


def append_refused(connection: sa.Connection, now: float, device: str, problem: str) -> None:
    """Write that a device was refused with this problem, once a round: a hostile one must not fill the disk."""
    told = t.refusals_logged.insert().prefix_with("OR IGNORE").values(device=device, problem=problem)
    if connection.execute(told).rowcount:
        round_ = connection.scalar(sa.select(sa.func.max(t.rounds.c.round))) or 0
        append(connection, now, audit.UpdateRefused(round_, device, problem))


def holds(connection: sa.Connection, entry: audit.Entry) -> bool:
    """Whether there is this very entry already, of whatever time."""
    same = sa.select(t.audit.c.number).where(t.audit.c.text == audit.encode_entry(entry)).limit(1)
    return connection.execute(same).first() is not None


def last_link(connection: sa.Connection) -> audit.Link | None:
    """The newest entry."""
    row = connection.execute(sa.select(t.audit).order_by(t.audit.c.number.desc()).limit(1)).one_or_none()
    return None if row is None else audit.Link(**row._mapping)


def read(connection: sa.Connection) -> Audited:
    """All of it; the caller's transaction makes it one instant."""
    rows = connection.execute(sa.select(t.audit).order_by(t.audit.c.number))
    return Audited(tuple(audit.Link(**row._mapping) for row in rows), frozenset(_facts(connection)))


def _facts(connection: sa.Connection) -> Iterator[str]:
    for row in connection.execute(sa.select(t.identity)):
        yield audit.task_fact(row.task, row.bundle)
    for row in connection.execute(sa.select(t.revocations)):
        yield audit.revoked_fact(row.device, row.signing_key)
    for row in connection.execute(sa.select(t.plan_keys)):
        yield audit.plan_key_fact(row.old, row.new)
    for row in connection.execute(sa.select(*_UPDATE)):
        yield audit.update_fact(row.round, row.device, row.digest, row.weight)
    for row in connection.execute(sa.select(*_ROUND)):
        yield audit.plan_fact(row.round, hashlib.sha256(row.plan).hexdigest())
        if row.state == "applied":
            yield from _applied_facts(row.round, row.summary)
        elif row.state == "discarded":
            yield audit.discarded_fact(row.round)


def _applied_facts(round_: int, text: str) -> Iterator[str]:
    try:
        summary = msgspec.json.decode(text, type=RoundStatus)
    except msgspec.DecodeError:
        return  # somebody has written there: the store does not say what the log does
    yield audit.applied_fact(round_, summary.adapter)
    for outlier in summary.outliers:
        yield audit.outlier_fact(round_, outlier.device, kept=outlier.kept)
