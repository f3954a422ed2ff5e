"""``python -m bench.federation``: runs what is missing, a process a run, and appends a line each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
import msgspec

from bench.errors import RequestError
from bench.federation.lines import Key, Line, read_lines
from bench.federation.methods import METHODS, RANK, VARIED, WITHOUT, Table, resolved
from bench.federation.site import Setup
from bench.federation.workloads import MAX_TOKENS, NATURAL, WORKLOADS
from bench.jsonl import append_line
from edge_runtime.wire import Products

QUICK_DATASET = "banking77"
CORE = ("lora-r8", "lora-r1", "rolora-r8", "lora-a2", "annealed-kill-revive")
QUICK = ("lora-r8", "rolora-r8", "annealed-kill-revive")
QUICK_BUDGETS = ("", "small", "large")  # four rows with these
_NUMPY_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # set on some machines; they would handicap numpy
_SHOWN_LINES = 3  # of a process that failed


@dataclass(frozen=True)
class Bench:
    """How runs are made, whatever their key."""

    data: Path
    out: Path
    threads: int
    products: Products
    extra: Mapping[str, Table]
    tiers: tuple[int, ...] = (0,)

    def run(self, key: Key) -> Line | str:
        """The line of a run, or why there is none."""
        folder = self.out / "runs" / run_name(key)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        workload = WORKLOADS[key.dataset]
        setup = Setup(
            key=key,
            data=str(self.data),
            bundle=str(self.out / "bundles" / key.dataset),
            folder=str(folder),
            sizes=workload.quick if key.quick else workload.sizes,
            threads=self.threads,
            products=self.products,
            extra=resolved(self.extra, workload.reference_bytes),
            tiers=self.tiers,
        )
        path = folder / "setup.json"
        path.write_bytes(msgspec.json.encode(setup))
        command = [sys.executable, "-W", "ignore", "-m", "bench.federation.experiment", str(path)]
        with (folder / "log.txt").open("w") as log:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=log, text=True, check=False, env=_environment()
            )
        if done.returncode:
            said = (folder / "log.txt").read_text().strip().splitlines()[-_SHOWN_LINES:]
            return f"{run_name(key)}: ended with {done.returncode}: " + " / ".join(said)
        shutil.rmtree(folder / "devices")
        return msgspec.json.decode(done.stdout, type=Line)


def run_name(key: Key) -> str:
    """A run's folder."""
    split = NATURAL if key.alpha is None else f"{key.alpha:g}"
    parts = [key.dataset, split, str(key.seed), key.method, key.budget, key.without and f"without-{key.without}"]
    return "-".join(part for part in parts if part) + ("-quick" if key.quick else "")


def ensure_bundle(dataset: str, bench: Bench) -> None:
    """Export the data set's bundle unless it is there.

    Raises:
        click.ClickException: the export failed.
        RequestError: the data cannot be used.
    """
    out = bench.out / "bundles" / dataset
    if out.exists():
        return
    workload = WORKLOADS[dataset]
    command = [sys.executable, "-W", "ignore", "-m", "edge_runtime.cli", "export", "--model", workload.model]
    command += ["--task", workload.task, "--rank", str(RANK), "--max-tokens", str(MAX_TOKENS), "--out", str(out)]
    labels = workload.labels(bench.data)
    command += ["--labels", ",".join(labels)] if labels else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " / ".join(done.stderr.strip().splitlines()[-_SHOWN_LINES:])
        raise click.ClickException(f"export for {dataset}: {said}")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _NUMPY_SETTINGS}


def complete(bench: Bench, wanted: Sequence[Key], results: Path, jobs: int) -> int:
    """Make every run that ``results`` has not; returns how many failed."""
    there = read_lines(results)
    missing = [key for key in wanted if key not in there]
    for dataset in dict.fromkeys(key.dataset for key in missing):
        ensure_bundle(dataset, bench)
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(bench.run, key): key for key in missing}
        for number, future in enumerate(as_completed(running), start=1):
            line = future.result()
            if isinstance(line, str):
                failed += 1
                click.echo(f"{number}/{len(missing)} failed: {line}", err=True)
                continue
            append_line(results, line)
            click.echo(f"{number}/{len(missing)} {summary(line)}", err=True)
    return failed


def summary(line: Line) -> str:
    """A line for people."""
    sent = (line.bytes_up + line.bytes_down) / 1e6
    return (
        f"{run_name(line.key)}: {line.metric.name} {line.end:.4f} (from {line.start:.3f}), {sent:.2f} MB, "
        f"{(line.params_up + line.params_down) / 1e6:.2f} M values, {line.device_gflop / 1e3:.1f} TFLOP, "
        f"{line.seconds:.0f} s"
    )


@dataclass(frozen=True)
class Choice:
    """What was asked for by name; an empty tuple leaves it to the data set."""

    datasets: tuple[str, ...] = ()
    alphas: tuple[float | None, ...] = ()
    methods: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


def keys_of(choice: Choice, without: str, *, quick: bool) -> list[Key]:
    """The runs that were asked for, seed after seed: what is interrupted can be compared.

    Raises:
        RequestError: a data set that was named has no such split or method, or no method has such a budget.
    """
    methods = choice.methods or (QUICK if quick else CORE)
    datasets = choice.datasets or ((QUICK_DATASET,) if quick else _fitting(choice.alphas, methods))
    found = []
    for dataset in datasets:
        workload = WORKLOADS[dataset]
        few = slice(1) if quick else slice(None)
        for seed, alpha, method in product(
            choice.seeds or workload.seeds[few], choice.alphas or workload.alphas[few], methods
        ):
            if refusal := workload.refusal(method, alpha):
                raise RequestError(f"{dataset}: {refusal}")
            every = METHODS[method].budgets
            wanted = choice.budgets or (QUICK_BUDGETS if quick else tuple(every))
            budgets = [budget for budget in every if budget in wanted]
            found += [Key(dataset, alpha, seed, method, budget, without, quick) for budget in budgets]
    if not found:
        raise RequestError(f"--budget {' '.join(choice.budgets)}: none of the methods has such a size")
    return sorted(found, key=lambda key: key.seed)


def _fitting(alphas: Sequence[float | None], methods: Sequence[str]) -> list[str]:
    """Data sets that have all of these."""
    return [
        name
        for name, workload in WORKLOADS.items()
        if not any(workload.refusal(method, alpha) for method in methods for alpha in alphas or workload.alphas)
    ]


def _alpha(text: str) -> float | None:
    return None if text == NATURAL else float(text)


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Folder of data sets."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench-federation"), show_default=True)
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path("bench/results/federation.jsonl"), show_default=True
)
@click.option(
    "--dataset", "datasets", type=click.Choice(list(WORKLOADS)), multiple=True, help="[default: all that fit]"
)
@click.option(
    "--alpha", "alphas", multiple=True, help=f"Of the split, or {NATURAL}.  [default: 0.5 0.1; shakespeare: {NATURAL}]"
)
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, help="[default: the core table]")
@click.option("--budget", "budgets", multiple=True, help="Of a method with several.  [default: all]")
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, help="[default: 0 1 2; shakespeare: 0]")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of one run.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Runs at once.")
@click.option("--products", type=click.Choice(["exact", "int8"]), default="exact", show_default=True)
@click.option("--set", "settings", multiple=True, help="table.key=value in JSON, over the method's config: to try out.")
@click.option(
    "--tier",
    "tiers",
    type=click.IntRange(0),
    multiple=True,
    help="That devices take, in turn; the method needs tiers, by --set.  [default: 0]",
)
@click.option(
    "--without",
    default="",
    help=f"Of annealed-kill-revive, one of {', '.join(WITHOUT)}; or, beside --set, a name for what that changes.",
)
@click.option("--quick", is_flag=True, help="One seed, one split, fewer rounds.")
def main(
    data: Path,
    out: Path,
    results: Path,
    datasets: tuple[str, ...],
    alphas: tuple[str, ...],
    methods: tuple[str, ...],
    budgets: tuple[str, ...],
    seeds: tuple[int, ...],
    threads: int,
    jobs: int,
    products: Products,
    settings: tuple[str, ...],
    tiers: tuple[int, ...],
    without: str,
    quick: bool,
) -> None:
    """Let methods learn the same with the same devices, and count what they send and compute.

    MiniLM learns classes: 4,000 texts over 20 devices, 5 a round, 30 rounds. SmolLM2 learns to predict Shakespeare's
    speakers: 20 of them, 20 speeches each, 5 a round, 12 rounds. A run is a JSON line in RESULTS; those that are there
    are not made again, so an interrupted table goes on where it was.

    \b
    Example:
      python -m bench.federation --data data --dataset banking77 --alpha 0.1 --method lora-r8 --seed 0
      python -m bench.federation --data data --method rolora-r8 --without strong-devices \\
          --set tiers.enabled=true --tier 0 --tier 1 --tier 2
    """
    extra: Mapping[str, Table] = _extra(settings)
    if (extra or tiers) and not without:  # its line would pass for one of the method itself
        raise click.UsageError("--set and --tier make a variant: expected --without and a name for it")
    if without and not (extra or tiers):
        if without not in WITHOUT or methods != ("annealed-kill-revive",):
            raise click.UsageError(
                f"--without {without}: expected --set, or --method annealed-kill-revive and a known name"
            )
        extra, budgets = WITHOUT[without], budgets or (VARIED,)
    bench = Bench(data, out, threads, products, extra, tiers or (0,))
    try:
        wanted = keys_of(Choice(datasets, tuple(map(_alpha, alphas)), methods, budgets, seeds), without, quick=quick)
        failed = complete(bench, wanted, results, jobs)
    except (RequestError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    if failed:
        raise click.ClickException(f"{failed} of {len(wanted)} runs failed: the reasons are above")


def _extra(settings: Sequence[str]) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for text in settings:
        name, separator, value = text.partition("=")
        table, dot, key = name.partition(".")
        if not (separator and dot):
            raise click.UsageError(f"--set {text}: expected table.key=value")
        found.setdefault(table, {})[key] = msgspec.json.decode(value)
    return found


if __name__ == "__main__":
    main()
