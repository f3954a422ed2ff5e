"""One system in a process of its own: ``python -m bench.contestant SETUP.json``; step counts on stdin, a line each.

Each answer is one JSON line: first ``{"ready": true}`` or ``{"refused": reason}``, then for every count the
milliseconds of each step, forward, backward and optimizer together, what the system tells of the inside of these steps,
and the peak of memory since the process began. The first step's gradients are written to the setup's file, so that the
systems can be compared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import msgspec
import numpy as np

from bench.errors import UnavailableError
from bench.inside import Inside
from bench.systems import Setup, System
from edge_runtime.bundle import Array
from edge_runtime.training.memory import MemorySampler

Step = Callable[[], Inside | None]
Made = tuple[Step, dict[str, Array]]  # a step, and the first one's gradients by adapter name

# System -> module and function (setup) -> Made. Imported when chosen: a process holds only what its system needs.
MAKERS: dict[System, str] = {
    "emberlora-fp32": "bench.engine_step:bundle_engine",
    "emberlora-int8": "bench.engine_step:bundle_engine",
    "emberlora-int4": "bench.engine_step:bundle_engine",
    "torch-eager": "bench.torch_step:torch_peft",
    "torch-compile": "bench.torch_step:torch_peft",
    "torch-bf16": "bench.torch_step:torch_peft",
    "ort-training": "bench.engine_step:bundle_engine",
    "gemm-floor": "bench.floor_step:products_alone",
}


def make(setup: Setup) -> Made:
    """Set the system up and take its first step's gradients.

    Raises:
        UnavailableError: it cannot be run here.
    """
    if not setup.amx:
        from bench.amx import forbid_amx

        forbid_amx()
    module, _, function = MAKERS[setup.system].partition(":")
    made: Made = getattr(import_module(module), function)(setup)
    return made


def main(path: str) -> None:
    """Serve until standard input ends."""
    setup = msgspec.json.decode(Path(path).read_bytes(), type=Setup)
    with MemorySampler() as memory:
        try:
            step, first = make(setup)
        except UnavailableError as error:
            _say({"refused": str(error)})
            return
        np.savez(setup.gradients, **first)  # type: ignore[arg-type]  # mypy reads the names as options of savez
        del first
        for _ in range(2):
            step()
        _say({"ready": True})
        for line in sys.stdin:
            times: list[float] = []
            inside: list[Inside] = []
            for _ in range(int(line)):
                began = time.perf_counter()
                told = step()
                times.append(1e3 * (time.perf_counter() - began))
                if told is not None:
                    inside.append(told)
            peak = memory.peak
            _say(
                {"step_ms": times, "inside": inside, "peak_private_mb": peak.private_mb, "peak_total_mb": peak.total_mb}
            )


def _say(message: dict[str, object]) -> None:
    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
