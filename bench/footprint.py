"""What EmberLoRA takes before it trains: disk, idle memory, a change of plan, an export. ``python -m bench.footprint``.

One JSON line a figure: {"case", "value", "unit", "goal", "detail", "host", "commit", "quick"}; ``goal`` is a maximum
or null.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TypeVar

import click
import msgspec

from bench.exporting import Stages
from bench.figures import Figure, append_figure
from bench.idle import measure_idle
from bench.install import measure_installs
from bench.models import write_model
from bench.replan import Change, Changes
from bench.shapes import MODELS

PARTS = ("install", "idle", "export", "plan-change")
_DEPTHS = (6, 30)  # of llama-6 and of SmolLM2-135M
_EXPORT_GOAL_S = 60.0
_CHANGE_GOAL_S = 0.3
T = TypeVar("T")


def measure_exports(folder: Path, threads: int) -> Iterator[Figure]:
    """Export a shallow and a deep Llama, each in a process of its own; the deep bundle stays in ``folder``."""
    made = {}
    for layers in _DEPTHS:
        model = _model(folder, layers)
        made[layers] = _child(Stages, "bench.exporting", model, _bundle(folder, layers), threads)
        goal = _EXPORT_GOAL_S if layers == max(_DEPTHS) else None
        yield Figure(
            f"export-{layers}-layers", round(made[layers].total_s, 2), "s", goal, msgspec.to_builtins(made[layers])
        )
    shallow, deep = (made[layers].graphs_s for layers in _DEPTHS)
    yield Figure("export-graphs-deep-to-shallow", round(deep / shallow, 3), "ratio")


def measure_changes(folder: Path, threads: int, repeats: int) -> Iterator[Figure]:
    """Changes of plan on the deep model; its bundle is exported when an export has not left it there."""
    layers = max(_DEPTHS)
    bundle = _bundle(folder, layers)
    if not (bundle / "manifest.json").exists():
        _child(Stages, "bench.exporting", _model(folder, layers), bundle, threads)
    found = _child(Changes, "bench.replan", bundle, threads, repeats)
    yield change_figure("plan-change-first", found.first, found.engine_ms)
    yield change_figure("plan-change-again", found.again, found.engine_ms)


def change_figure(case: str, changes: tuple[Change, ...], engine_ms: tuple[float, ...]) -> Figure:
    """The median of what the changes took beyond a step, with the medians of its parts."""
    names = ("use_ms", "first_step_ms", "step_ms")
    detail = {name: round(median(getattr(change, name) for change in changes), 2) for name in names}
    detail |= {"engine_ms": round(median(engine_ms), 2), "repeats": len(changes)}
    return Figure(case, round(median(change.cost_ms for change in changes) / 1e3, 4), "s", _CHANGE_GOAL_S, detail)


def _model(folder: Path, layers: int) -> Path:
    """SmolLM2-135M at another depth."""
    model = folder / f"model-{layers}"
    if not (model / "tokenizer.json").exists():  # written last
        write_model(model, replace(MODELS["smollm2-135m"], layers=layers))
    return model


def _bundle(folder: Path, layers: int) -> Path:
    return folder / f"bundle-{layers}"


def _child(kind: type[T], module: str, *arguments: object) -> T:
    """Run a module of this package; its last line is a ``kind``."""
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{module}: failed: {done.stderr.strip()[-500:]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=kind)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench-footprint"), show_default=True)
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="May be repeated.  [default: all]")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="For export and plan change.")
@click.option("--quick", is_flag=True, help="Fewer repeats of the plan change.")
def main(out: Path, parts: tuple[str, ...], threads: int, quick: bool) -> None:
    """Measure what EmberLoRA takes before it trains; append a JSON line a figure to OUT/results.jsonl.

    \b
    install      disk space that an install adds to an empty environment (needs a package index): pip's own way, and
                 with requirements-device.txt; every file counts, bytecode that pip compiles included
    idle         memory of `emberlora edge run` that has sent an update and waits for the next round
    export       time from a loaded model to a verified bundle, 6 and 30 layers of width 576
    plan-change  new ranks and eight alive patterns over 30 blocks: what the first step takes beyond a later one, when
                 the patterns are new and when their sessions exist

    \b
    python -m bench.footprint --part install
    python -m bench.footprint --quick

    Models and bundles stay in OUT (2 GB) and are used again; environments are made in a temporary folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        if parts and part not in parts:
            continue
        with tempfile.TemporaryDirectory(prefix="bench-footprint-") as temporary:
            for figure in _figures(part, out, Path(temporary), threads, repeats=2 if quick else 5):
                click.echo(append_figure(out / "results.jsonl", figure, threads=threads, quick=quick))


def _figures(part: str, out: Path, temporary: Path, threads: int, repeats: int) -> Iterator[Figure]:
    if part == "install":
        return measure_installs(temporary)
    if part == "idle":
        return measure_idle(temporary)
    if part == "export":
        return measure_exports(out, threads)
    return measure_changes(out, threads, repeats)


if __name__ == "__main__":
    main()
