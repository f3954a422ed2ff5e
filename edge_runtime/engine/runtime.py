"""ONNX Runtime as the engine wants it: one thread pool for all sessions, and options chosen by measurement.

ONNX Runtime gives every session a spinning pool of its own unless told otherwise before the first session exists; on
few cores the idle pools take the busy one's time (157 against 116 ms a step, see ``docs/adr/0001``). So the size of the
pool is a choice made once per process.
"""

from __future__ import annotations

import os

import onnxruntime as ort

from edge_runtime.engine.errors import EngineInputError, EngineMissingError
from edge_runtime.engine.profile import current_profile

_UNWANTED = ["CommonSubexpressionElimination"]
_pool_threads: int | None = None


def check_runtime() -> None:
    """Demand an ONNX Runtime that can run the block engine.

    Raises:
        EngineMissingError: it is older; onnxruntime-training's 1.19.2 is, and cannot share a thread pool.
    """
    if not hasattr(ort, "set_global_thread_pool_sizes"):
        raise EngineMissingError(
            f"onnxruntime: too old for this bundle: expected 1.23.2 or newer, got {ort.__version__} "
            "(onnxruntime-training runs only bundles exported with --engine ort-training)"
        )


def start_runtime(threads: int | None = None) -> int:
    """Size the process's thread pool; the first call decides.

    Args:
        threads: Number of threads, None for one a core.

    Returns:
        The number of threads in force.

    Raises:
        EngineInputError: the pool exists already with another size.
        EngineMissingError: as :func:`check_runtime`.
    """
    global _pool_threads  # ONNX Runtime's pool is global to the process; this mirrors it
    check_runtime()
    if _pool_threads is None:
        _pool_threads = threads or _usable_cores()
        ort.set_default_logger_severity(3)
        ort.set_global_thread_pool_sizes(_pool_threads, 1)
    elif threads is not None and threads != _pool_threads:
        raise EngineInputError(
            f"threads: the pool of this process has {_pool_threads}: expected the same, got {threads}"
        )
    return _pool_threads


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_session(model: bytes) -> ort.InferenceSession:
    """A CPU session on the process's thread pool.

    The arena is off: it keeps the high-water mark of the longest sequence ever seen. Common subexpressions are not
    merged: a weight restored to float32 for the forward product would be kept for the backward one.
    """
    start_runtime()
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    profile = current_profile()
    if profile is not None:
        profile.ask(options)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=_UNWANTED)
    if profile is not None:
        profile.add(session)
    return session
