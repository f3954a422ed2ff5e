"""One training step, ours beside PyTorch's and beside the bare matrix products: ``python -m bench.step``.

Every system runs in a process of its own. On the small model they take turns, a few steps each, so that what disturbs
the machine disturbs all of them; the figures are medians over all turns. The models have random weights (time and
memory do not depend on values) and LoRA of rank 8 on all linear layers. One JSON line a row.

Settings are words, see :class:`bench.systems.Setting`. What is remembered is measured where the lowest blocks are dead:
the first step fills a file in the folder of results, the timed ones read it. It is in the page cache by then, so a
device whose data does not fit into memory reads slower.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import click
from rich.console import Console

from bench.alive import Alive, parse_alive
from bench.amx import has_amx
from bench.display import Display, results_table
from bench.entries import Entry, Request, can_remember, make_entry, reference_entry, settings_of, with_amx_off
from bench.errors import BenchError, RequestError, UnavailableError
from bench.jsonl import append_line
from bench.race import Race
from bench.results import Line, latest, read_lines
from bench.shapes import CASES, DEFAULT_CASES, MODELS
from bench.systems import FLOOR, SYSTEM_NAMES, WORDS, System

_WIDTH = 170  # of the table in a log file


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench-step"), show_default=True)
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="[default: 2x64 and 1x512]")
@click.option("--system", "systems", type=click.Choice(SYSTEM_NAMES), multiple=True, help="[default: all]")
@click.option(
    "--setting",
    "words",
    type=click.Choice(WORDS),
    multiple=True,
    help="Only settings with all of these words. tight: recompute, and give memory back after each block.",
)
@click.option(
    "--alive",
    default="1",
    show_default=True,
    help="Comma-separated: parts of the modules alive from the top (1,3/4,1/6), scattered, or one factor (A, B).",
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--turns", type=click.IntRange(1), help="Turns of four steps each.  [default: 12, of large models 3]")
@click.option("--tune/--no-tune", default=None, help="Try thread counts and modes of PyTorch. [default: not if quick]")
@click.option("--together", type=click.IntRange(1), default=16, show_default=True, help="Processes that take turns.")
@click.option("--quick", is_flag=True, help="Few turns and fewer settings, PyTorch not tuned.")
@click.option("--picture-only", is_flag=True, help="Draw OUT/step.html again and measure nothing.")
def main(  # budget: a command's options
    out: Path,
    cases: tuple[str, ...],
    systems: tuple[System, ...],
    words: tuple[str, ...],
    alive: str,
    threads: int,
    turns: int | None,
    tune: bool | None,
    together: int,
    quick: bool,
    picture_only: bool,
) -> None:
    """Time one training step of every system and measure its memory.

    Appends a JSON line a row to OUT/results.jsonl, prints it, and draws OUT/step.html from the last line of every kind.
    With several --alive values those of one system and setting take turns; to compare systems, give one value. Large
    models run one system after the other, and only when asked for with --case.
    """
    request = Request(
        out=out,
        systems=systems or SYSTEM_NAMES,
        words=words,
        threads=threads,
        turns=turns,
        tune=not quick if tune is None else tune,
        quick=quick,
        together=together,
        amx=has_amx(),
    )
    console = Console(stderr=True, width=None if sys.stderr.isatty() else _WIDTH)
    out.mkdir(parents=True, exist_ok=True)
    try:
        if not picture_only:
            _measure(request, cases or DEFAULT_CASES, alive, console)
        _draw(out, console)
    except RequestError as error:
        raise click.UsageError(str(error)) from error
    except BenchError as error:
        raise click.ClickException(str(error)) from error


def _measure(request: Request, cases: Sequence[str], alive: str, console: Console) -> None:
    choices = {case: parse_alive(alive, MODELS[CASES[case].model].modules) for case in cases}  # refuse early
    found: list[Line] = []
    with console.status("") as status:
        display = Display(console, status)
        for case in cases:
            display.case(case)
            for line in _measure_case(request, case, choices[case], display):
                click.echo(append_line(request.out / "results.jsonl", line))
                found.append(line)
    shown = latest(found)
    for case, pattern in dict.fromkeys((line.case, line.pattern) for line in shown):
        console.print(results_table(case, pattern, shown))


def _measure_case(request: Request, case: str, choices: Sequence[Alive], display: Display) -> Iterator[Line]:
    measured = Race(request, display, lambda: datetime.now(timezone.utc))
    entries = list(_entries(request, case, choices, display))
    # After the entries, so that the adapter is made from a bundle that is needed anyway.
    for choice in choices if any(entry.setup.system != FLOOR for entry in entries) else ():
        try:
            measured.make_reference(reference_entry(request, case, choice))
        except UnavailableError as error:
            display.note(f"no gradients to compare with: {error}")
    size = request.together if CASES[case].together else 1
    for start in range(0, len(entries), size):
        yield from measured.lines(entries[start : start + size])


def _entries(request: Request, case: str, choices: Sequence[Alive], display: Display) -> Iterator[Entry]:
    """The rows of one case; those of one system and setting stand side by side."""
    for system in request.systems:
        for setting in settings_of(request, system):
            for choice in choices:
                if not can_remember(setting, choice):
                    if "remembered" in request.words:
                        display.note(f"{system}: {setting}: {choice.pattern} alive leaves no dead block at the bottom")
                    continue
                display.doing(f"preparing {system}")
                try:
                    yield from with_amx_off(make_entry(request, case, choice, system, setting))
                except UnavailableError as error:
                    display.note(str(error))


def _draw(out: Path, console: Console) -> None:
    from bench.picture import write_picture

    path = out / "step.html"
    write_picture(path, read_lines(out / "results.jsonl"))
    console.print(f"picture: {path}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
