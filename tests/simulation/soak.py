"""Many random scenarios: ``python -m tests.simulation.soak --count 100000``; ``make soak`` runs it.

A scenario that breaks an invariant (:mod:`tests.simulation.ledger`) is made as short as it gets and printed as a case
for ``test_simulation_cases.py``; the run goes on, and ends with 1.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from tests.simulation.ops import random_ops
from tests.simulation.scenario import DEVICES, case, failure, make_task, shrink
from tests.simulation.server import Task

_SLICE = 50  # scenarios that a process is given at once
_PROGRESS_S = 10.0
_MOST_FAILURES = 5  # then it ends: the rest would be the same again


def failures(task: Task, seeds: Sequence[int]) -> list[str]:
    """What is wrong with the scenarios of these seeds that fail, each with its shortest case."""
    found = []
    with _no_collection():
        for seed in seeds:
            ops = random_ops(random.Random(seed), DEVICES)
            if failure(task, ops, seed=seed) is not None:
                short = shrink(task, ops, seed=seed)
                found.append(f"seed {seed}: {failure(task, short, seed=seed)}\n{case(short, seed)}")
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection until the end: it takes a tenth of the time, and nothing here is large."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


def _failures_in(folder: Path, seeds: range) -> list[str]:
    """The same, in a process of its own that makes what scenarios share when it is first asked."""
    if folder not in _TASKS:
        _TASKS[folder] = make_task(Path(tempfile.mkdtemp(dir=folder)))
    return failures(_TASKS[folder], seeds)


_TASKS: dict[Path, Task] = {}


def _tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def soak(count: int, first: int, jobs: int) -> int:
    """Run the scenarios of ``count`` seeds from ``first`` on in so many processes; the number of those that failed."""
    slices = [range(start, min(start + _SLICE, first + count)) for start in range(first, first + count, _SLICE)]
    broken, done, began = 0, 0, time.monotonic()
    told = began
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        answers = pool.map(_failures_in, [Path(folder)] * len(slices), slices)
        for seeds, found in zip(slices, answers, strict=True):
            broken, done, now = broken + len(found), done + len(seeds), time.monotonic()
            for text in found:
                _tell(text)
            if now - told > _PROGRESS_S or done == count or broken >= _MOST_FAILURES:
                told, rate = now, done / (now - began)
                left_min = (count - done) / rate / 60
                _tell(f"{done:,} scenarios, {broken} broken, {rate:.1f}/s, {left_min:.0f} min left")
            if broken >= _MOST_FAILURES:
                pool.shutdown(cancel_futures=True)
                break
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.soak", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="how many scenarios (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one; the next ones follow")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    given = parser.parse_args()
    return 1 if soak(given.count, given.seed, given.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
