"""``emberlora cloud audit …``: the log of what the aggregator did, checked, shown and traced."""

from __future__ import annotations

import asyncio
import re
import sys
from datetime import datetime
from pathlib import Path

import click
import msgspec

from cloud.audit import KINDS
from cloud.commandline import config_option, json_option, load, one_line_errors
from cloud.errors import ConfigError
from edge_runtime import wire

_TIMES = ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S")


@click.group()
def audit() -> None:
    """Check and read the log of what the aggregator did. Nothing is changed; the server may run."""


@audit.command()
@config_option
@click.option("--head", help="A digest noted earlier (`cloud status` shows the newest) that must still be in the log.")
@json_option
@one_line_errors
def verify(config_path: Path, head: str | None, as_json: bool) -> None:
    """Recompute the log's chain of digests and compare it with what is stored.

    Ends with 0 when all of it is whole, else with 1 and a line that says at which entry it breaks, and how. Only with
    --head does it show that entries at the end were cut off.

    \b
    Example:
      emberlora cloud audit verify --config server --head 5f0c…
    """
    from cloud.audit_report import verify as verify_log

    if head is not None:
        _check_digest(head, what="--head")
    verdict = asyncio.run(verify_log(load(config_path), head))
    if as_json:
        click.echo(msgspec.json.encode(verdict).decode())
    elif verdict.whole:
        click.echo(str(verdict))
    else:
        click.echo(f"emberlora cloud: {verdict}", err=True)
    if not verdict.whole:
        sys.exit(1)


@audit.command()
@click.argument("digest")
@config_option
@json_option
@one_line_errors
def trace(digest: str, config_path: Path, as_json: bool) -> None:
    """Show which rounds, devices and sealed updates made an adapter; with --json an object a round.

    DIGEST is the SHA-256 of an adapter as plans and `cloud status --json` name it, or of the adapter_model.safetensors
    that is published. The log is verified first: when it is broken, a line says where, and the exit status is 1.

    \b
    Example:
      emberlora cloud audit trace 5f0c… --config server
    """
    from cloud.audit_report import trace as trace_adapter
    from cloud.audit_report import trace_lines

    _check_digest(digest, what="adapter")
    verdict, rounds = asyncio.run(trace_adapter(load(config_path), digest))
    if not verdict.whole:
        click.echo(f"emberlora cloud: {verdict}", err=True)
        sys.exit(1)
    for line in (msgspec.json.encode(round_).decode() for round_ in rounds) if as_json else trace_lines(rounds):
        click.echo(line)


@audit.command()
@config_option
@click.option("--kind", type=click.Choice(KINDS), help="Only entries of this kind.")
@click.option("--device", help="Only entries about this device.")
@click.option("--round", "round_", type=click.IntRange(min=0), help="Only entries about this round, from 0.")
@click.option("--since", type=click.DateTime(_TIMES), help="Only entries from this local time on.")
@json_option
@one_line_errors
def show(
    config_path: Path, kind: str | None, device: str | None, round_: int | None, since: datetime | None, as_json: bool
) -> None:
    """Show what was logged, a line an entry; with --json an object a line, digests in full.

    \b
    Examples:
      emberlora cloud audit show --config server --device laptop-1 --since 2026-11-26
      emberlora cloud audit show --config server --kind update-refused --json
    """
    from cloud.audit_report import Wanted
    from cloud.audit_report import show as show_log

    if device is not None:
        wire.check_name(device, what="device")
    wanted = Wanted(kind, device, round_, None if since is None else since.timestamp())
    for line in asyncio.run(show_log(load(config_path), wanted, as_json=as_json)):
        click.echo(line)


def _check_digest(text: str, *, what: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise ConfigError(f"{what} {text[:80]!r}: expected a SHA-256, 64 digits 0-9 and a-f")
