"""The tables of schema 3, the first that can be migrated."""

from __future__ import annotations

from typing import Any

from alembic import op
from sqlalchemy import REAL, Column, ForeignKey, Integer, LargeBinary, Text
from sqlalchemy.types import TypeEngine

revision = "3"
down_revision = None


def upgrade() -> None:
    """Make them in an empty database; a folder of schema 3 has them, and begins after this."""
    for name, columns in _tables().items():
        op.create_table(name, *columns, sqlite_strict=True)


def _needed(**types: type[TypeEngine[Any]]) -> list[Column[Any]]:
    return [Column(name, kind, nullable=False) for name, kind in types.items()]


def _tables() -> dict[str, list[Column[Any]]]:
    return {
        "identity": [Column("only", Integer, primary_key=True), *_needed(schema=Integer, task=Text, bundle=Text)],
        "tokens": [
            Column("digest", Text, primary_key=True),
            *_needed(device=Text, expires=REAL),
            Column("used_by", Text),
        ],
        "devices": [
            Column("name", Text, primary_key=True),
            *_needed(signing_key=Text, enrolled=REAL),
            Column("last_seen", REAL),
            Column("left_at", REAL),
            *_needed(bytes_down=Integer),
        ],
        "rounds": [
            Column("round", Integer, primary_key=True),
            *_needed(state=Text, plan=LargeBinary),
            Column("round_key", LargeBinary),
            *_needed(opened=REAL, deadline=REAL, evidence=Text, master=Text, changed=Text),
            Column("summary", Text),
        ],
        "updates": [
            Column("round", Integer, ForeignKey("rounds.round"), primary_key=True),
            Column("device", Text, ForeignKey("devices.name"), primary_key=True),
            *_needed(digest=Text, weight=Integer, bytes=Integer, received=REAL, metrics=Text),
        ],
    }
