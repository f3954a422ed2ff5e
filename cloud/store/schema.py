"""The tables. Times are Unix seconds, digests SHA-256 in hex. A change of any of them raises ``SCHEMA`` and has a
revision in :mod:`cloud.store.migrations`."""

from __future__ import annotations

from sqlalchemy import (
    REAL,
    Column,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)

SCHEMA = 4
IDENTITY_SCHEMA = 4  # in ``identity`` from 4 on, whatever ``SCHEMA`` is: versions before it refuse anything but 3
metadata = MetaData()

version = Table(
    "alembic_version",
    metadata,
    Column("version_num", String(32), nullable=False),  # SCHEMA in digits
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)
identity = Table(
    "identity",
    metadata,
    Column("only", Integer, primary_key=True),  # always 1
    Column("schema", Integer, nullable=False),  # IDENTITY_SCHEMA; before 4 the schema
    Column("task", Text, nullable=False),
    Column("bundle", Text, nullable=False),
    sqlite_strict=True,
)
tokens = Table(
    "tokens",
    metadata,
    Column("digest", Text, primary_key=True),  # of the secret; the secret itself is never kept
    Column("device", Text, nullable=False),
    Column("expires", REAL, nullable=False),
    Column("used_by", Text),  # signing key it was used with, hex
    sqlite_strict=True,
)
devices = Table(
    "devices",
    metadata,
    Column("name", Text, primary_key=True),
    Column("signing_key", Text, nullable=False),  # Ed25519 public key, hex
    Column("enrolled", REAL, nullable=False),
    Column("last_seen", REAL),
    Column("left_at", REAL),
    Column("bytes_down", Integer, nullable=False),
    sqlite_strict=True,
)
revocations = Table(
    "revocations",
    metadata,
    Column("device", Text, ForeignKey("devices.name"), primary_key=True),  # a revoked name does not come back
    Column("signing_key", Text, nullable=False),  # that it had; no other name may enrol with it
    Column("revoked", REAL, nullable=False),
    sqlite_strict=True,
)
retired_keys = Table(
    "retired_keys",
    metadata,
    Column("signing_key", Text, primary_key=True),  # that a device has replaced; none may change to it
    Column("device", Text, ForeignKey("devices.name"), nullable=False),
    sqlite_strict=True,
)
plan_keys = Table(
    "plan_keys",
    metadata,
    Column("number", Integer, primary_key=True),  # from 0, without gaps: each statement is by the key of the one before
    Column("task", Text, nullable=False),
    Column("old", Text, nullable=False),
    Column("new", Text, nullable=False),
    Column("signature", Text, nullable=False),  # with the old key; see wire.KeyStatement
    sqlite_strict=True,
)
capabilities = Table(
    "capabilities",
    metadata,
    Column("device", Text, ForeignKey("devices.name"), primary_key=True),
    Column("told", REAL, nullable=False),
    Column("capability", Text, nullable=False),  # wire.Capability as JSON, the newest
    sqlite_strict=True,
)
refusals = Table(
    "refusals",
    metadata,
    Column("device", Text, ForeignKey("devices.name"), primary_key=True),
    Column("problem", Text, primary_key=True),  # its name in the contract, so a device makes only a few rows
    Column("updates", Integer, nullable=False),  # so many
    sqlite_strict=True,
)
rounds = Table(
    "rounds",
    metadata,
    Column("round", Integer, primary_key=True),
    Column("state", Text, nullable=False),  # open | applied | discarded | finished
    Column("plan", LargeBinary, nullable=False),  # as signed
    Column("round_key", LargeBinary),  # X25519 private key; NULL once the round is final
    Column("opened", REAL, nullable=False),
    Column("deadline", REAL, nullable=False),
    Column("evidence", Text, nullable=False),  # what the plan was made from, as JSON; see cloud.planning.Evidence
    Column("master", Text, nullable=False),  # digest of the adapter before it is rounded for devices
    Column("changed", Text, nullable=False),  # since when each tensor is as it is, as JSON; see cloud.download.Since
    Column("summary", Text),  # RoundStatus as JSON, of applied rounds
    sqlite_strict=True,
)
updates = Table(
    "updates",
    metadata,
    Column("round", Integer, ForeignKey("rounds.round"), primary_key=True),
    Column("device", Text, ForeignKey("devices.name"), primary_key=True),
    Column("digest", Text, nullable=False),  # of the sealed bytes
    Column("weight", Integer, nullable=False),  # as counted
    Column("bytes", Integer, nullable=False),
    Column("received", REAL, nullable=False),
    Column("metrics", Text, nullable=False),  # LocalMetrics as JSON
    sqlite_strict=True,
)
arrivals = Table(
    "arrivals",
    metadata,
    Column("round", Integer, ForeignKey("rounds.round"), primary_key=True),
    Column("device", Text, ForeignKey("devices.name"), primary_key=True),
    Column("seconds", REAL, nullable=False),  # from the request's head to the last byte of the update that counts
    sqlite_strict=True,
)
audit = Table(
    "audit",
    metadata,
    Column("number", Integer, primary_key=True),  # from 0, without gaps
    Column("time_ms", Integer, nullable=False),
    Column("previous", Text, nullable=False),  # digest of the entry before
    Column("digest", Text, nullable=False),  # own, over all other columns; see cloud.audit
    Column("text", Text, nullable=False),  # the entry as JSON
    sqlite_strict=True,
)
refusals_logged = Table(
    "refusals_logged",
    metadata,
    Column("device", Text, ForeignKey("devices.name"), primary_key=True),
    Column("problem", Text, primary_key=True),  # refused so in the open round, and the audit log says it already
    sqlite_strict=True,
)
