"""``python -m bench.learning``: trains what is missing, one process a training, and shows what came out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import msgspec

from bench.errors import RequestError, UnavailableError
from bench.host import commit, describe_host
from bench.jsonl import append_line
from bench.learning.lesson import Outcome, Setup
from bench.learning.lines import SYSTEMS, Key, Line, System, base_of, read_lines, table
from bench.learning.picture import write_picture
from bench.learning.tasks import RECIPES, Recipe, ensure_bundle, ensure_start, write_examples
from edge_runtime.bundle import Base

STEPS, QUICK_STEPS = 200, 20
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
_NUMPY_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # set on some machines; they would handicap numpy

Teach = Callable[[Key], Line]


def wanted_keys(tasks: Sequence[str], systems: Sequence[System], seeds: Sequence[int], *, quick: bool) -> list[Key]:
    """Every training asked for; a whole seed before the next, so that an interrupted run can be compared."""
    steps = QUICK_STEPS if quick else STEPS
    return [Key(task, system, seed, steps, quick) for seed in seeds for task in tasks for system in systems]


def complete(path: Path, wanted: Sequence[Key], teach: Teach, say: Callable[[str], None]) -> list[Line]:
    """Run what the file of results has not, and append it, a line as soon as it is there.

    A training that fails is said and left out; the others go on.

    Returns:
        The file's lines of as many steps as wanted, in the order wanted, those of other filters after them.

    Raises:
        RequestError: the data or the file of results cannot be used.
    """
    done = {line.key for line in read_lines(path)}
    missing = [key for key in wanted if key not in done]
    for number, key in enumerate(missing, start=1):
        say(f"{number}/{len(missing)}: {key.task}, {key.system}, seed {key.seed}")
        try:
            say(append_line(path, teach(key)))
        except UnavailableError as error:
            say(f"left out: {error}")
    kinds = {(key.steps, key.quick) for key in wanted}
    found = {line.key: line for line in read_lines(path) if (line.steps, line.quick) in kinds}
    return [found[key] for key in dict.fromkeys([*wanted, *found]) if key in found]


class Classroom:
    """Trains in child processes, with files made when they are first needed."""

    def __init__(self, data: Path, out: Path, threads: int) -> None:
        self._data, self._out, self._threads = data, out, threads
        self._failed: dict[tuple[str, Base], UnavailableError] = {}  # exports, not tried again: they take minutes

    def teach(self, key: Key) -> Line:
        """Train and measure once.

        Raises:
            BenchError: the data cannot be used, or the export or the training failed.
        """
        recipe = RECIPES[key.task]
        outcome = self._run(key, self._setup(key, recipe))
        return Line(
            key.task,
            key.system,
            key.seed,
            key.steps,
            recipe.metric,
            outcome.curve,
            outcome.curve[-1][1],
            outcome.train_s,
            dict(describe_host(self._threads)),
            commit(),
            key.quick,
        )

    def _setup(self, key: Key, recipe: Recipe) -> Setup:
        examples = write_examples(recipe, self._data, self._out / "data", quick=key.quick)
        bundle = self._bundle(recipe, base_of(key.system), examples.train)
        start = ensure_start(bundle, self._out / "start" / f"{key.task}-{key.seed}", key.seed)
        return Setup(
            recipe,
            key.system,
            key.seed,
            key.steps,
            self._threads,
            recipe.model,
            str(bundle),
            str(start),
            str(examples.train),
            str(examples.held_out),
        )

    def _bundle(self, recipe: Recipe, base: Base, train: Path) -> Path:
        if (recipe.name, base) in self._failed:
            raise self._failed[recipe.name, base]
        try:
            return ensure_bundle(recipe, base, self._out / "bundles", train)
        except UnavailableError as error:
            self._failed[recipe.name, base] = error
            raise

    def _run(self, key: Key, setup: Setup) -> Outcome:
        path = self._out / "setups" / f"{key.task}-{key.system}-{key.seed}-{key.steps}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(setup))
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "bench.learning.lesson", str(path)],
            stdout=subprocess.PIPE,  # stderr is progress, and on failure the reason, for the terminal
            text=True,
            check=False,
            env={name: value for name, value in os.environ.items() if name not in _NUMPY_SETTINGS},
        )
        if done.returncode:
            raise UnavailableError(
                f"{key.task}, {key.system}, seed {key.seed}: ended with {done.returncode}: see above"
            )
        return msgspec.json.decode(done.stdout, type=Outcome)


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder with text_clinc150 and lm_gsm8k.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench-learning"), show_default=True)
@click.option("--task", "tasks", type=click.Choice(list(RECIPES)), multiple=True, help="[default: all]")
@click.option("--system", "systems", type=click.Choice(SYSTEMS), multiple=True, help="[default: all]")
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, help="[default: 0 1 2; 0 when quick]")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--quick", is_flag=True, help="20 steps, one seed, few held-out examples.")
def main(
    data: Path,
    out: Path,
    tasks: tuple[str, ...],
    systems: tuple[System, ...],
    seeds: tuple[int, ...],
    threads: int,
    quick: bool,
) -> None:
    """Train the same with peft and with every kind of bundle, and compare the held-out metric.

    MiniLM learns CLINC150 and SmolLM2-135M the answers of GSM8K, 200 steps each. A training is a JSON line in
    OUT/results.jsonl; those that are there are not run again, so an interrupted run goes on where it was. The curves
    are drawn in OUT/learning.html.

    \b
    Example:
      python -m bench.learning --data data --task clinc150 --system peft --system emberlora-fp32
    """
    out.mkdir(parents=True, exist_ok=True)
    wanted = wanted_keys(
        tasks or tuple(RECIPES), systems or SYSTEMS, seeds or (QUICK_SEEDS if quick else SEEDS), quick=quick
    )
    classroom = Classroom(data, out, threads)
    try:
        lines = complete(out / "results.jsonl", wanted, classroom.teach, lambda text: click.echo(text, err=True))
    except RequestError as error:
        raise click.UsageError(str(error)) from error
    if lines:
        write_picture(out / "learning.html", lines)
        click.echo(table(lines))
        click.echo(f"curves: {out / 'learning.html'}", err=True)
    absent = len(set(wanted) - {line.key for line in lines})
    if absent:
        raise click.ClickException(f"{absent} of {len(wanted)} trainings failed: the reasons are above")


if __name__ == "__main__":
    main()
