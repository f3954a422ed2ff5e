"""Many random scenarios: ``python -m tests.simulation.soak --count 100000``; ``make soak`` runs it.

A scenario that breaks an invariant (:mod:`tests.simulation.ledger`) is made as short as it gets and printed as a case
for ``test_simulation_cases.py``; the run goes on, and ends with 1.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.simulation.ops import random_ops
from tests.simulation.scenario import DEVICES, case, failure, make_task, shrink
from tests.simulation.server import Task

_PROGRESS_S = 10.0
_COLLECTED = 50  # scenarios between two garbage collections
_MOST_FAILURES = 5  # then it ends: the rest would be the same again


def failures(task: Task, seeds: range) -> Iterator[tuple[int, str | None]]:
    """Every seed and, where its scenario fails, the shortest case and what is wrong with it."""
    with _seldom_collected():
        for seed in seeds:
            if seed % _COLLECTED == 0:
                gc.collect()
            ops = random_ops(random.Random(seed), DEVICES)
            if failure(task, ops, seed=seed) is None:
                yield seed, None
                continue
            short = shrink(task, ops, seed=seed)
            yield seed, f"{failure(task, short, seed=seed)}\n{case(short, seed)}"


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """No garbage collection of its own accord: it takes a tenth of the time, and nothing here is large."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.soak", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="how many scenarios (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one; the next ones follow")
    given = parser.parse_args()
    broken, began = 0, time.monotonic()
    told = began
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(Path(folder))
        for seed, text in failures(task, range(given.seed, given.seed + given.count)):
            now, done = time.monotonic(), seed - given.seed + 1
            if text is not None:
                broken += 1
                _tell(f"seed {seed}: {text}")
            if now - told > _PROGRESS_S or done == given.count or broken == _MOST_FAILURES:
                told = now
                rate = done / (now - began)
                left_min = (given.count - done) / rate / 60
                _tell(f"{done:,} scenarios, {broken} broken, {rate:.1f}/s, {left_min:.0f} min left")
            if broken == _MOST_FAILURES:
                break
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
