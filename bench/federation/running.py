"""Runs that are missing, a process each; what was made is a line in a file and is not made again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import click
import msgspec

from bench.federation.lines import Key, Line, read_lines
from bench.federation.methods import RANK, Table, resolved
from bench.federation.site import Setup
from bench.federation.workloads import MAX_TOKENS, NATURAL, WORKLOADS
from bench.jsonl import append_line
from edge_runtime.wire import Products

_NUMPY_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # set on some machines; they would handicap numpy
_SHOWN_LINES = 3  # of a process that failed


@dataclass(frozen=True)
class Run:
    """A run to be made.

    Attributes:
        key: What tells it from others.
        extra: Tables over the method's config.
        tiers: That devices take, in turn.
        remember: Whether they keep what frozen blocks make of examples.
    """

    key: Key
    extra: Mapping[str, Table] = field(default_factory=dict)
    tiers: tuple[int, ...] = (0,)
    remember: bool = True


@dataclass(frozen=True)
class Bench:
    """How runs are made, whichever they are."""

    data: Path
    out: Path
    threads: int
    products: Products

    def make(self, run: Run) -> Line | str:
        """The line of a run, or why there is none."""
        key = run.key
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
            extra=resolved(run.extra, workload.reference_bytes),
            tiers=run.tiers,
            remember=run.remember,
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


def complete(bench: Bench, wanted: Sequence[Run], results: Path, jobs: int) -> int:
    """Make every run that ``results`` has not; returns how many failed."""
    there = read_lines(results)
    missing = [run for run in wanted if run.key not in there]
    for dataset in dict.fromkeys(run.key.dataset for run in missing):
        ensure_bundle(dataset, bench)
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(bench.make, run) for run in missing]
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
    return (
        f"{run_name(line.key)}: {line.metric.name} {line.end:.4f} (from {line.start:.3f}), "
        f"{line.bytes_both / 1e6:.2f} MB, {line.params_both / 1e6:.2f} M values, {line.device_gflop / 1e3:.1f} TFLOP, "
        f"{line.seconds:.0f} s"
    )
