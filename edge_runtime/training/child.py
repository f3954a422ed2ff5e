"""The training child: ``python -m edge_runtime.training.child JOB.json [--held]``.

See :mod:`edge_runtime.training.job`, and :mod:`edge_runtime.training.held` for the option.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from edge_runtime.bundle import BundleError
from edge_runtime.bundle.atomic import write_atomically
from edge_runtime.data import DataError
from edge_runtime.engine.errors import EngineError, EngineMissingError
from edge_runtime.training.held import HELD, end_with_parent
from edge_runtime.training.job import FRAME_NAME, Event, Failed, TrainingJob
from edge_runtime.training.round import run_round
from edge_runtime.wire import WireError


def main(argv: list[str]) -> int:
    """Run one job.

    Args:
        argv: Its file, and the option.

    Returns:
        Exit code. 0: the frame is written; 2: the user's data or installation is the cause; 1: anything else.
    """
    if HELD in argv[1:]:
        end_with_parent()
    job = msgspec.json.decode(Path(argv[0]).read_bytes(), type=TrainingJob)
    try:
        frame, done = run_round(job, _emit)
    except (DataError, EngineMissingError) as error:
        _emit(Failed(str(error), input=True))
        return 2
    except (WireError, BundleError, EngineError, OSError, MemoryError) as error:
        _emit(Failed(f"{type(error).__name__}: {error}", input=False))
        return 1
    write_atomically(Path(job.out) / FRAME_NAME, [frame])
    _emit(done)
    return 0


def _emit(event: Event) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
