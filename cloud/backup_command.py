"""``emberlora cloud backup``: the operator copies a task."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click
import msgspec

from cloud.commandline import config_option, json_option, load, one_line_errors
from cloud.config import CONFIG_NAME


@click.command()
@config_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; new or empty.")
@json_option
@one_line_errors
def backup(config_path: Path, out: Path, as_json: bool) -> None:
    """Copy config, keys, database and blobs as they are at one moment; the server may run.

    The bundle and the certificate's files are not copied. The copy holds the keys of the task and of the open round:
    keep it as you keep the server's disk. Only the newest copy is of use, see docs/operations.md.

    \b
    Example:
      emberlora cloud backup --config server --out backup/$(date +%F)
    """
    from cloud.backup import back_up  # the other commands need no database

    file = config_path / CONFIG_NAME if config_path.is_dir() else config_path
    found = asyncio.run(back_up(load(config_path), file, out))
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    what = f"round {found.round + 1}, {found.updates} update{'' if found.updates == 1 else 's'} of it"
    click.echo(f"{found.folder}: {found.task} at {what}; audit log's head {found.audit_head}")
