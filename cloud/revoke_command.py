"""``emberlora cloud revoke``: the operator refuses a device for good."""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

from cloud.commandline import ask, config_option, json_option, one_line_errors
from edge_runtime import wire


@click.command()
@config_option
@click.option("--device", "--name", "device", required=True, help="Name of the device, as `cloud devices` shows it.")
@json_option
@one_line_errors
def revoke(config_path: Path, device: str, as_json: bool) -> None:
    """Refuse a device's key from now on. It cannot be undone; asked again, it says so and changes nothing.

    The device says one line and stops. Neither its name nor its key can enrol again: a machine that is to go on takes
    a token for another name and makes a new key. What was counted of it stays counted, in the open round too, as it was
    told so. The server must run.

    \b
    Example:
      emberlora cloud revoke --config server --device laptop-1
    """
    wire.check_name(device, what="device")
    found = ask(config_path, lambda client: client.revoke(device))
    click.echo(msgspec.json.encode(found).decode() if as_json else describe(found))


def describe(found: wire.Revoked) -> str:
    """A revocation in one line."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.revoked))
    done = f"was revoked already, at {when}" if found.already else "is revoked: its key is refused from now on"
    stays = f"{found.updates} update{'' if found.updates == 1 else 's'} of applied rounds"
    if found.open_round is not None:
        stays += f" and the one counted in round {found.open_round + 1}, which is open,"
    return f"{found.device} {done}; {stays} stay counted"
