"""The tables that versions since schema 3 added when they started, and Alembic's own in place of ``identity.schema``.

Any of them may be there: one that such a version has made.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import REAL, Column, ForeignKey, Integer, Text
from sqlalchemy.schema import SchemaItem

revision = "4"
down_revision = "3"


def _device(*, key: bool) -> SchemaItem:
    return Column("device", Text, ForeignKey("devices.name"), primary_key=key, nullable=False)


def upgrade() -> None:
    """Make those that are missing."""
    there = set(sa.inspect(op.get_bind()).get_table_names())
    for name, columns in _added().items():
        if name not in there:
            op.create_table(name, *columns, sqlite_strict=True)
    op.execute("UPDATE identity SET schema = 4")  # and stays so: versions before this refuse anything but 3


def _added() -> dict[str, list[SchemaItem]]:
    return {
        "revocations": [
            _device(key=True),
            Column("signing_key", Text, nullable=False),
            Column("revoked", REAL, nullable=False),
        ],
        "retired_keys": [Column("signing_key", Text, primary_key=True), _device(key=False)],
        "plan_keys": [
            Column("number", Integer, primary_key=True),
            *(Column(name, Text, nullable=False) for name in ("task", "old", "new", "signature")),
        ],
        "capabilities": [
            _device(key=True),
            Column("told", REAL, nullable=False),
            Column("capability", Text, nullable=False),
        ],
        "refusals": [
            _device(key=True),
            Column("problem", Text, primary_key=True),
            Column("updates", Integer, nullable=False),
        ],
        "arrivals": [
            Column("round", Integer, ForeignKey("rounds.round"), primary_key=True),
            _device(key=True),
            Column("seconds", REAL, nullable=False),
        ],
        "audit": [
            Column("number", Integer, primary_key=True),
            Column("time_ms", Integer, nullable=False),
            *(Column(name, Text, nullable=False) for name in ("previous", "digest", "text")),
        ],
        "refusals_logged": [_device(key=True), Column("problem", Text, primary_key=True)],
    }
