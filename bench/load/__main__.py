"""``python -m bench.load``: many devices against a real aggregator process on loopback."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from pathlib import Path

import click

from bench.errors import BenchError
from bench.jsonl import append_line
from bench.load.cases import CASES, run_case


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Only these.  [default: all]")
@click.option("--quick", is_flag=True, help="Fewer updates: a few minutes for all.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Where the aggregator's folders go.  [default: a temporary folder]"
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("bench/results/load.jsonl"),
    show_default=True,
    help="A line a case is appended here.",
)
def main(names: tuple[str, ...], quick: bool, out: Path | None, results: Path) -> None:
    """Send sealed updates to an aggregator in a process of its own, and say what it takes.

    Every update is signed, sealed, verified, written to the disk and summed as in a task. Devices and aggregator share
    the machine, so the figure by processor time (mb_s_core) says more than the one by the clock.

    \b
    Examples:
      python -m bench.load --quick
      python -m bench.load --case 1mb
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the aggregator ends as well
    for name in names or CASES:
        with tempfile.TemporaryDirectory(dir=out, prefix="emberlora-load-") as folder:
            try:
                line = asyncio.run(
                    run_case(name, Path(folder), quick=quick, say=lambda text: click.echo(text, err=True))
                )
            except BenchError as error:
                click.echo(str(error), err=True)
                sys.exit(1)
        click.echo(append_line(results, line))


if __name__ == "__main__":
    main()
