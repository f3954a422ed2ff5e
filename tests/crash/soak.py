"""Many scenarios of killed processes: ``python -m tests.crash.soak --count 200``; ``make soak`` runs it.

A scenario that breaks an invariant (:mod:`tests.crash.ledger`) is told with what was killed in it, and its folder is
kept; the run goes on, and ends with 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.crash.ledger import BrokenError
from tests.crash.scenario import run
from tests.crash.site import make_task

_PROGRESS_S = 10.0
_MOST_FAILURES = 5  # then it ends: the rest would be the same again


def failure(task: Path, folder: Path, seed: int) -> str | None:
    """What is wrong with the scenario of this seed, if something is."""
    try:
        run(task, folder, seed)
    except BrokenError as error:
        return f"seed {seed}: {error}"
    return None


def _tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def soak(folder: Path, count: int, first: int, jobs: int) -> int:
    """Run the scenarios of ``count`` seeds from ``first`` on, so many at once; the number of those that failed."""
    task = make_task(folder / "task")
    broken, told, began = 0, 0.0, time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:  # threads: all the work is done by the processes they start
        seeds = range(first, first + count)
        answers = pool.map(lambda seed: failure(task, folder / f"seed-{seed}", seed), seeds)
        for done, found in enumerate(answers, start=1):
            if found is not None:
                broken += 1
                _tell(found)
            now = time.monotonic()
            if now - told > _PROGRESS_S or done == count or broken >= _MOST_FAILURES:
                told, rate = now, done / (now - began)
                left_min = (count - done) / rate / 60
                _tell(f"{done:,} scenarios of kills, {broken} broken, {rate:.2f}/s, {left_min:.0f} min left")
            if broken >= _MOST_FAILURES:
                pool.shutdown(cancel_futures=True)
                break
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.soak", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="how many scenarios (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first one; the next ones follow")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once (default: one a core)")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="emberlora-crash-"))
    broken = soak(folder, given.count, given.seed, given.jobs)
    if not broken:  # else what is left of the broken ones is kept
        shutil.rmtree(folder)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
