"""``emberlora cloud rotate-plan-key``: plans are signed with a new key from the next round on."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from cloud.commandline import ask, config_option, json_option, one_line_errors
from cloud.operator import OperatorClient
from edge_runtime import wire


@click.command("rotate-plan-key")
@config_option
@json_option
@one_line_errors
def rotate_plan_key(config_path: Path, as_json: bool) -> None:
    """Have the next round's plan signed with a new key; the old one signs the statement that devices follow.

    The open round keeps its plan and its updates. Asked again before it ends, this says so and changes nothing; after
    that, it is another change. The old private key is deleted when the next round has begun. Make a backup then: a
    server restored from an older one has not got the new key, and devices that have seen it obey no other. The server
    must run.

    \b
    Example:
      emberlora cloud rotate-plan-key --config server
    """
    found = ask(config_path, OperatorClient.rotate_plan_key)
    click.echo(msgspec.json.encode(found).decode() if as_json else describe(found))


def describe(found: wire.PlanKeyRotation) -> str:
    """A change of the plan key in one line."""
    done = "is waiting already, and nothing was changed" if found.already else "is made"
    return (
        f"a new plan key, {found.new[:12]} in place of {found.old[:12]}, {done}: "
        f"it signs plans from round {found.round + 1} on"
    )
