"""``emberlora edge floors``: what no plan can make this device do, shown or changed."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from edge_runtime.device.commands import home_option, json_option, one_line
from edge_runtime.device.floors import Floors
from edge_runtime.device.home import Home

_MIB = 1 << 20
_MEBIBYTES = click.IntRange(min=1, max=1 << 28)


@click.command()
@home_option
@click.option("--max-adapter-mb", type=_MEBIBYTES, metavar="MB", help="Largest adapter file, in MiB.")
@click.option("--max-bundle-mb", type=_MEBIBYTES, metavar="MB", help="Largest bundle, in MiB.")
@click.option("--max-modules", type=click.IntRange(min=1), metavar="N", help="Most modules of a plan.")
@click.option("--max-steps", type=click.IntRange(min=1), metavar="N", help="Most optimizer steps, or epochs, a round.")
@click.option(
    "--norm-bound/--no-norm-bound",
    default=None,
    help="Train only for plans that bound the norm of a change; the operator sets task.max_update_norm.",
)
@click.option("--defaults", is_flag=True, help="Go back to the defaults first.")
@json_option
def floors(  # noqa: PLR0913  # click passes each option as an argument
    *,
    home: Path,
    max_adapter_mb: int | None,
    max_bundle_mb: int | None,
    max_modules: int | None,
    max_steps: int | None,
    norm_bound: bool | None,
    defaults: bool,
    as_json: bool,
) -> None:
    """Say what no plan can make this device do, however well it is signed; without options, show it.

    A plan that asks for more is not obeyed: the device says so, and asks again later. A device that runs takes up
    changes when it is started the next time.

    \b
    Example:
      emberlora edge floors --max-bundle-mb 2000 --max-steps 500
      emberlora edge floors --norm-bound
    """
    asked = {
        "max_adapter_bytes": max_adapter_mb and max_adapter_mb * _MIB,
        "max_bundle_bytes": max_bundle_mb and max_bundle_mb * _MIB,
        "max_modules": max_modules,
        "max_steps": max_steps,
        "norm_bound": norm_bound,
    }
    with one_line():
        place = Home(home)
        place.membership()
        settings = place.settings()
        base = Floors() if defaults else settings.floors
        changes = {name: value for name, value in asked.items() if value is not None}
        found = msgspec.structs.replace(base, **changes)
        if found != settings.floors:
            place.save_settings(msgspec.structs.replace(settings, floors=found))
    click.echo(msgspec.json.encode(found) if as_json else _text(found))


def _text(found: Floors) -> str:
    rows = {
        "adapter": f"at most {found.max_adapter_bytes / _MIB:,.0f} MiB",
        "bundle": f"at most {found.max_bundle_bytes / _MIB:,.0f} MiB",
        "modules": f"at most {found.max_modules:,}",
        "steps": f"at most {found.max_steps:,} a round",
        "norm": "plans must bound a change's" if found.norm_bound else "plans need not bound a change's",
    }
    return "\n".join(f"{name:<12} {text}" for name, text in rows.items())
