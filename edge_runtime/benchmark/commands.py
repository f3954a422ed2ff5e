"""``emberlora edge bench``: what training costs on this device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from edge_runtime.benchmark.errors import BenchmarkError
from edge_runtime.benchmark.page import page
from edge_runtime.benchmark.report import lines
from edge_runtime.benchmark.running import BenchOptions, run_bench
from edge_runtime.bundle import BundleError
from edge_runtime.engine.errors import EngineError, EngineInputError, EngineMissingError
from edge_runtime.terminal import Terminal
from edge_runtime.training.commands import InputError

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(short_help="Measure what training costs on this device.")
@click.option("--bundle", "bundles", type=_FOLDER, multiple=True, required=True, help="May be repeated, to compare.")
@click.option("--tokens", type=click.IntRange(4), default=128, show_default=True, help="Of each example.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Examples a step.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]")
@click.option(
    "--memory-budget-mb",
    type=click.IntRange(1),
    help="What training may take; the verdict compares with it.  [default: 60 % of free memory]",
)
@click.option("--profile", is_flag=True, help="Also say which operators a step's time goes to.")
@click.option("--quick", is_flag=True, help="Fewer settings, three steps of each: a first impression.")
@click.option("--html", "html_path", type=click.Path(dir_okay=False, path_type=Path), help="Write a page as well.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(as_json: bool, html_path: Path | None, **options: Any) -> None:  # the rest are the fields of BenchOptions
    """Measure what training costs on this device: time, memory, a change of plan, bytes of a round.

    Settings are all, the upper half and the upper sixth of the blocks alive; the bundle's rank and half of it;
    activations kept and recomputed; exact and int8 products where the bundle has them. Each is measured in a process
    of its own, on random tokens. The verdict says which tier of blocks fits this device and how long a sequence may be.

    \b
    emberlora edge bench --bundle minilm-bundle --quick
    emberlora edge bench --bundle fp32-bundle --bundle int4-bundle --profile --html bench.html
    """
    terminal = Terminal(sys.stderr)
    try:
        if html_path is not None and not html_path.parent.is_dir():
            raise EngineInputError(f"--html: {html_path.parent}: no such folder")
        report = run_bench(BenchOptions(**options), terminal)
        if html_path is not None:
            html_path.write_text(page(report), encoding="utf-8")
    except (BundleError, EngineInputError, EngineMissingError) as error:
        raise InputError(str(error)) from error
    except (BenchmarkError, EngineError, OSError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        terminal.close()
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
        return
    for line in lines(report):
        click.echo(line)
