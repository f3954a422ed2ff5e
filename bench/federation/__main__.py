"""``python -m bench.federation``: runs what is missing, a process a run, and appends a line each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec

from bench.errors import RequestError
from bench.federation.data import DATASETS, NATURAL, read_corpus, write_records
from bench.federation.experiment import Setup
from bench.federation.lines import Key, Line, append_line, read_lines
from bench.federation.methods import METHODS, RANK, VARIED, WITHOUT
from edge_runtime.wire import Products

DEVICES, COHORT, ROUNDS, EXAMPLES = 20, 5, 30, 4_000
QUICK_ROUNDS = 12
ALPHAS = ("0.5", "0.1")
SEEDS = (0, 1, 2)
CORE = ("lora-r8", "lora-r1", "rolora-r8", "lora-a2", "annealed-kill-revive")
QUICK = ("lora-r8", "rolora-r8", "annealed-kill-revive")  # four rows, as the last has two budgets
_NUMPY_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # set on some machines; they would handicap numpy
_SHOWN_LINES = 3  # of a process that failed


@dataclass(frozen=True)
class Bench:
    """How runs are made, whatever their key."""

    data: Path
    out: Path
    threads: int
    products: Products
    extra: Mapping[str, Mapping[str, object]]

    def run(self, key: Key) -> Line | str:
        """The line of a run, or why there is none."""
        folder = self.out / "runs" / run_name(key)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        setup = Setup(
            key=key,
            data=str(self.data),
            bundle=str(self.out / "bundles" / key.dataset),
            folder=str(folder),
            devices=DEVICES,
            cohort=COHORT,
            rounds=QUICK_ROUNDS if key.quick else ROUNDS,
            examples=EXAMPLES,
            threads=self.threads,
            products=self.products,
            extra={name: dict(keys) for name, keys in self.extra.items()},
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
    """
    out = bench.out / "bundles" / dataset
    if out.exists():
        return
    corpus = read_corpus(dataset, bench.data)
    train = write_records(bench.out / "bundles" / f"{dataset}.jsonl", corpus.train)
    command = [sys.executable, "-W", "ignore", "-m", "edge_runtime.cli", "export", "--model", "minilm"]
    command += ["--task", "classify", "--rank", str(RANK), "--max-tokens", "64", "--labels-from", str(train)]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
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
        f"{run_name(line.key)}: accuracy {line.accuracy:.4f} (from {line.accuracy_start:.3f}), {sent:.2f} MB, "
        f"{(line.params_up + line.params_down) / 1e6:.2f} M values, {line.device_gflop / 1e3:.1f} TFLOP, "
        f"{line.seconds:.0f} s"
    )


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Folder of data sets."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench-federation"), show_default=True)
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path("bench/results/federation.jsonl"), show_default=True
)
@click.option("--dataset", "datasets", type=click.Choice(DATASETS), multiple=True, help="[default: all]")
@click.option("--alpha", "alphas", multiple=True, help=f"Of the split, or {NATURAL!r}.  [default: {' '.join(ALPHAS)}]")
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, help="[default: the core table]")
@click.option("--budget", "budgets", multiple=True, help="Of a method with several.  [default: all of them]")
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, help="[default: 0 1 2]")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of one run.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Runs at once.")
@click.option("--products", type=click.Choice(["exact", "int8"]), default="exact", show_default=True)
@click.option("--set", "settings", multiple=True, help="table.key=value in JSON, over the method's config: to try out.")
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
    without: str,
    quick: bool,
) -> None:
    """Let methods learn the same with the same devices, and count what they send and compute.

    4,000 texts over 20 devices, 5 a round, 30 rounds. A run is a JSON line in RESULTS; those that are there are not
    made again, so an interrupted table goes on where it was.

    \b
    Example:
      python -m bench.federation --data data --dataset banking77 --alpha 0.1 --method lora-r8 --seed 0
    """
    if without and not settings and (without not in WITHOUT or methods != ("annealed-kill-revive",)):
        raise click.UsageError(
            f"--without {without}: expected --set, or --method annealed-kill-revive and a known name"
        )
    if without and not settings:
        budgets = budgets or (VARIED,)
    bench = Bench(data, out, threads, products, _extra(settings) if settings else dict(WITHOUT.get(without, {})))
    chosen_alphas = alphas or (ALPHAS[:1] if quick else ALPHAS)
    try:
        wanted = [
            Key(dataset, None if alpha == NATURAL else float(alpha), seed, method, budget, without, quick)
            for seed in seeds or (SEEDS[:1] if quick else SEEDS)
            for dataset in datasets or (DATASETS[1:] if quick else DATASETS)
            for alpha in chosen_alphas
            for method in methods or (QUICK if quick else CORE)
            for budget in METHODS[method].budgets
            if not budgets or budget in budgets
        ]
        if not wanted:
            raise RequestError(f"--budget {' '.join(budgets)}: none of the methods has such a size")
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
