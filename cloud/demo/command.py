"""``emberlora demo``.

Exit status 0: done and within bounds; 1: a command failed or a bound was missed; 2: bad usage; 130: interrupted.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

import click
import msgspec
from rich.console import Console

from cloud.demo.errors import DemoError, DemoInputError, MissedError
from cloud.demo.folder import DemoFolder
from cloud.demo.progress import Show, megabytes
from cloud.demo.recipe import CLASSIFY, LM, QUICK, Recipe
from cloud.demo.record import Report, misses
from cloud.demo.run import run_demo


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Folder.")
@click.option("--devices", type=click.IntRange(2, 64), help="Number of device processes.  [default: 4]")
@click.option("--rounds", type=click.IntRange(1, 1000), help="Number of rounds.  [default: 12; with --lm 6]")
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps of a device in a round.  [default: 12; --lm 5]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--lm", is_flag=True, help="SmolLM2 on source code instead of MiniLM on docstrings; ten minutes.")
@click.option("--quick", is_flag=True, help="Two short rounds: shows that everything works, not how well.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON and no progress.")
def demo(out: Path, lm: bool, quick: bool, as_json: bool, **chosen: int | None) -> None:
    """Run all of EmberLoRA on this machine and write a report.

    A bundle is exported; an aggregator and four devices, each a process of its own, train it together on the standard
    library's docstrings, which stay where they are; the published adapter is measured on the devices and by peft.

    \b
    emberlora demo
    emberlora demo --lm --out runs/lm
    """
    recipe = _recipe(LM if lm else CLASSIFY, quick, chosen)
    signal.signal(signal.SIGTERM, _interrupt)  # so that the processes below end with this one
    show = Show(Console(stderr=True, quiet=as_json, highlight=False))
    try:
        folder = DemoFolder.prepare(out)
        report = run_demo(folder, recipe, show, quick=quick)
        _say_report(report, show, out)
        if as_json:
            click.echo(msgspec.json.encode(report).decode())
        missed = [] if quick else misses(report)
        if missed:
            raise MissedError("; ".join(missed))
    except KeyboardInterrupt:
        click.echo(f"interrupted; every process has ended; logs in {out / 'logs'}", err=True)
        sys.exit(130)
    except DemoError as error:
        click.echo(f"emberlora demo: {error}", err=True)
        sys.exit(2 if isinstance(error, DemoInputError) else 1)


def _recipe(base: Recipe, quick: bool, chosen: dict[str, int | None]) -> Recipe:
    """The recipe with what the user chose; what was chosen wins over ``--quick``."""
    short = QUICK if quick else {}
    given = {name: value for name, value in chosen.items() if value is not None}
    return msgspec.structs.replace(base, **{**short, **given})


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say_report(report: Report, show: Show, out: Path) -> None:
    tfidf = "" if report.tfidf is None else f", tf-idf {report.tfidf:.3f}"
    show.say(
        f"{report.metric}: {report.before:.3f} before, {report.after:.3f} after "
        f"(peft says {report.peft_after:.3f}); pooled training {report.central:.3f}{tfidf}"
    )
    show.say(
        f"traffic: {megabytes(report.bytes_up)} up, {megabytes(report.bytes_down)} down; "
        f"averaging the full model would be {megabytes(report.bytes_full_fedavg)}"
    )
    show.say(f"{report.run_s:.0f} s; report: {out / 'report.html'}, adapter for peft: {out / report.adapter}")
