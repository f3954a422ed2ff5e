"""``emberlora cloud rotate-operator-key``: the operator's commands are signed with a new key."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import click
import msgspec

from cloud.commandline import config_option, json_option, load, one_line_errors


@click.command("rotate-operator-key")
@config_option
@json_option
@one_line_errors
def rotate_operator_key(config_path: Path, as_json: bool) -> None:
    """Replace the key that this folder's commands (token, revoke, stop, …) prove themselves with.

    Do it after a copy of the server's keys may have got into other hands: the old key is refused from the next start
    on. Devices notice nothing, and tokens that were made go on working. The server must be stopped. A command that was
    interrupted is finished by the next one.

    \b
    Example:
      emberlora cloud rotate-operator-key --config server
    """
    from cloud.operator_key import rotate  # the other commands need no database
    from cloud.store import Identity
    from edge_runtime.bundle import open_bundle

    config = load(config_path)
    identity = Identity(config.task.name, open_bundle(config.bundle_path, verify=False).digest)
    found = asyncio.run(rotate(config, identity, now=time.time()))
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    done = "was begun before, and is finished now" if found.resumed else "is made"
    click.echo(
        f"the change of the operator's key, {found.new[:12]} in place of {found.old[:12]}, {done}; start the server"
    )
