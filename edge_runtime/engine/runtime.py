"""ONNX Runtime as the engine wants it: one thread pool for all sessions, and options chosen by measurement.

ONNX Runtime gives every session a spinning pool of its own unless told otherwise before the first session exists; on
few cores the idle pools take the busy one's time (157 against 116 ms a step, see ``docs/adr/0001``). So the size of the
pool is a choice made once per process.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import onnxruntime as ort

from edge_runtime.engine.errors import EngineInputError, EngineMissingError
from edge_runtime.engine.profile import current_profile

_UNWANTED = ["CommonSubexpressionElimination"]
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST_HEAP_BLOCK = 32 << 20  # the most that glibc takes for this threshold
_TIGHT_BYTES = 512 << 10
_pool_threads: int | None = None
_tight = True  # until an engine says that there is memory


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


def choose_allocation(*, tight: bool) -> None:
    """Tell the C library how to hold temporaries: glibc's own way hands large blocks back and forth unpredictably.

    Blocks come from the heap and stay there for the next step, or with ``tight`` large ones come from the system and go
    back at once: the peak is what is in use (147 instead of 258 MiB on SmolLM2-135M with everything recomputed), but
    every page is faulted in anew. Holds for the process and the sessions opened from now on; other C libraries are
    left as they are.

    ONNX Runtime plans all temporaries of a run as one block. That is larger than any heap takes, so it comes from the
    system and goes back at every run: with ``tight`` better than many blocks that do, else worse than many that do not
    (350 against 300 ms for a recomputed step of 512 tokens in float32, 280 against 200 with int8 products).

    Args:
        tight: Whether memory matters more than time.
    """
    global _tight  # the C library's settings are global to the process; this goes with them
    _tight = tight
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "gnu_get_libc_version"):
        return
    library.mallopt(_MMAP_THRESHOLD, _TIGHT_BYTES if tight else _LARGEST_HEAP_BLOCK)
    library.mallopt(_TRIM_THRESHOLD, _TIGHT_BYTES if tight else 2**31 - 1)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_session(model: bytes, constants: Path | None = None) -> ort.InferenceSession:
    """A CPU session on the process's thread pool; ``constants`` is the folder of files that hold the model's.

    The arena is off, but for a profile: it keeps the high-water mark of the longest sequence ever seen. Common
    subexpressions are not merged: a weight restored to float32 for the forward product would be kept for the backward
    one.
    """
    start_runtime()
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = _tight
    options.log_severity_level = 3
    if constants is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(constants))
    profile = current_profile()
    if profile is not None:
        profile.ask(options)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"], disabled_optimizers=_UNWANTED)
    if profile is not None:
        profile.add(session)
    return session
