"""The training child: ``python -m edge_runtime.training.child``.

See :mod:`edge_runtime.training.job`, and :mod:`edge_runtime.training.held` for how it ends with its parent.
"""

from __future__ import annotations

import sys

import msgspec

from edge_runtime.at_rest import AtRestError, WrongStorageKeyError
from edge_runtime.bundle import BundleError
from edge_runtime.data import DataError
from edge_runtime.engine.errors import EngineError, EngineMissingError
from edge_runtime.training.held import end_with_parent, read_job
from edge_runtime.training.job import Event, Failed, TrainingJob
from edge_runtime.training.round import run_round, write_frame
from edge_runtime.wire import WireError


def main() -> int:
    """Run the job that standard input brings.

    Returns:
        Exit code. 0: the frame is written; 2: the user's data or installation is the cause; 1: anything else.
    """
    job = msgspec.json.decode(read_job(), type=TrainingJob)
    end_with_parent()
    try:
        frame, done = run_round(job, _emit)
    except (DataError, EngineMissingError, WrongStorageKeyError) as error:
        _emit(Failed(str(error), input=True))
        return 2
    except (WireError, BundleError, AtRestError, EngineError, OSError, MemoryError) as error:
        _emit(Failed(f"{type(error).__name__}: {error}", input=False))
        return 1
    write_frame(job, frame)
    _emit(done)
    return 0


def _emit(event: Event) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
