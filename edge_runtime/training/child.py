"""The training child: ``python -m edge_runtime.training.child``.

See :mod:`edge_runtime.training.job`, and :mod:`edge_runtime.training.held` for how it ends with its parent.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import msgspec

from edge_runtime.at_rest import AtRestError, Vault, WrongStorageKeyError
from edge_runtime.bundle import BundleError
from edge_runtime.data import DataError
from edge_runtime.engine.errors import EngineError, EngineMissingError
from edge_runtime.training.checkpoint import Checkpoints, StoppedError
from edge_runtime.training.held import end_with_parent, read_job
from edge_runtime.training.job import Event, Failed, TrainingJob
from edge_runtime.training.round import run_round, write_frame
from edge_runtime.wire import WireError


def main() -> int:
    """Run the job that standard input brings.

    Returns:
        Exit code. 0: the frame is written; 2: the user's data or installation is the cause; 143: SIGTERM ended it
        after a checkpoint; 1: anything else.
    """
    job = msgspec.json.decode(read_job(), type=TrainingJob)
    end_with_parent()
    checkpoints = _checkpoints(job)
    try:
        frame, done = run_round(job, _emit, checkpoints=checkpoints)
    except StoppedError:
        return 128 + signal.SIGTERM
    except (DataError, EngineMissingError, WrongStorageKeyError) as error:
        _emit(Failed(str(error), input=True))
        return 2
    except (WireError, BundleError, AtRestError, EngineError, OSError, MemoryError) as error:
        _emit(Failed(f"{type(error).__name__}: {error}", input=False))
        return 1
    write_frame(job, frame)
    _emit(done)
    return 0


def _checkpoints(job: TrainingJob) -> Checkpoints | None:
    """Where the job wants them; SIGTERM then asks for one before it ends this process."""
    if job.checkpoint is None:
        return None
    checkpoints = Checkpoints(Path(job.checkpoint), Vault(job.grant), job.round, every_s=job.checkpoint_s)

    def stop(number: int, _frame: object) -> None:
        if not checkpoints.stop():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, stop)
    return checkpoints


def _emit(event: Event) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(event) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
