"""The console script ``emberlora``: the ``edge`` commands of this package, and those that installed extras add.

Other packages register click commands under the entry-point group ``emberlora.commands``. They are imported only when
called, so a device never loads what it does not use, and a missing extra is one clear line. ``importlib.metadata`` is
imported where it is used: with what it brings it would take 2 MB of a process that waits for weeks.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import click

# Command name -> (where it lives, one line of help). Stated here so that --help imports nothing.
_EDGE_COMMANDS = {
    "train": ("edge_runtime.training.commands:train", "Train an adapter on local data, without any server."),
    "eval": ("edge_runtime.training.commands:evaluate", "Measure an adapter on labelled data."),
    "predict": ("edge_runtime.training.commands:predict", "Classify texts, or continue them."),
    "bench": ("edge_runtime.benchmark.commands:bench", "Measure what training costs on this device."),
    "enroll": ("edge_runtime.device.commands:enroll", "Make this device known to an aggregator."),
    "run": ("edge_runtime.device.commands:run", "Take part in rounds until the task is finished."),
    "status": ("edge_runtime.device.commands:status", "Show what this device is doing and has done."),
    "rules": ("edge_runtime.device.rules_command:rules", "Say when this device may train: power, heat, memory, rest."),
    "floors": ("edge_runtime.device.floors_command:floors", "Say what no plan can make this device do."),
    "leave": ("edge_runtime.device.commands:leave", "Leave the task; the aggregator forgets this device's key."),
    "rotate-key": ("edge_runtime.device.commands:rotate_key", "Replace this device's key by a new one."),
    "trust": ("edge_runtime.device.commands:trust", "Change whose certificate the server must show."),
}
_EXTRA_COMMANDS = {
    "export": ("export", "Turn a model into a bundle for devices."),
    "peft-eval": ("export", "Measure a published adapter with torch and peft."),
    "cloud": ("cloud", "Run the aggregator: init, serve, token, status, stop."),
    "demo": ("demo", "Run the whole of it on this machine: export, four devices, one aggregator."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def __init__(self, commands: Mapping[str, tuple[str, str]], **attrs: object) -> None:
        """``commands``: name -> ("module:attribute", one line of help)."""
        super().__init__(**attrs)  # type: ignore[arg-type]  # click's own keyword arguments, passed on
        self._lazy = dict(commands)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order they are stated, which is the order a user meets them."""
        return [*self._lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command by name."""
        if cmd_name not in self._lazy:
            return super().get_command(ctx, cmd_name)
        module, attribute = self._lazy[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        rows = [(name, text) for name, (_, text) in self._lazy.items()]
        rows += [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class _Root(click.Group):
    """``edge`` plus the commands of the entry-point group."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from importlib.metadata import entry_points

        known = {point.name for point in entry_points(group="emberlora.commands")} | set(_EXTRA_COMMANDS)
        return ["edge", *(name for name in _EXTRA_COMMANDS if name in known), *sorted(known - set(_EXTRA_COMMANDS))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        from importlib.metadata import entry_points

        for point in entry_points(group="emberlora.commands", name=cmd_name):
            try:
                loaded: click.Command = point.load()
            except ModuleNotFoundError as error:
                extra = _EXTRA_COMMANDS.get(cmd_name, (cmd_name, ""))[0]
                raise click.ClickException(
                    f"{cmd_name}: needs the package {error.name!r}, which is not installed: "
                    f"pip install 'emberlora[{extra}]'"
                ) from error
            return loaded
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [
            (
                "edge",
                "Everything on a device: train, eval, predict, bench, enroll, run, status, leave, rotate-key, trust.",
            )
        ]
        rows += [(name, text) for name, (_, text) in _EXTRA_COMMANDS.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="emberlora", prog_name="emberlora")
def main() -> None:
    """Fine-tune language models with LoRA on the devices where the data is.

    \b
    A workstation makes a bundle:    emberlora export --help
    An operator runs an aggregator:  emberlora cloud --help
    A device trains and takes part:  emberlora edge --help
    See all of it on this machine:   emberlora demo
    """


@main.group(cls=LazyGroup, commands=_EDGE_COMMANDS)
def edge() -> None:
    """Everything on a device. Nothing here needs torch.

    \b
    Without a server:  emberlora edge train --bundle B --data mine.jsonl --out my-adapter
    With one:          emberlora edge enroll --server URL --token T --name pi-1
                       emberlora edge run --data mine.jsonl
    """


if __name__ == "__main__":
    main()
