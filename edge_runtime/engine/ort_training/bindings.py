"""The C bindings of onnxruntime-training, the only place that loads them.

``import onnxruntime.training`` would import torch; the bindings underneath do without. The package ended with 1.19.2,
so what is used here cannot change any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnxruntime as ort

from edge_runtime.engine.errors import EngineMissingError, GraphError

# Its exceptions have no base class of their own.
_FAILURES = (
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoSuchFile",
    "NotImplemented",
    "RuntimeException",
)
_NEEDED = "GradientGraphBuilder"  # stock ONNX Runtime has no such binding


def load_bindings() -> Any:
    """The binding module.

    Raises:
        EngineMissingError: this environment has stock ONNX Runtime, or a mixture of both packages.
    """
    try:
        from onnxruntime.capi import _pybind_state as bindings
    except ImportError as error:
        raise EngineMissingError(f"onnxruntime: cannot be imported: {error}") from error
    if not hasattr(bindings, _NEEDED):
        version = getattr(ort, "__version__", "a damaged installation")
        raise EngineMissingError(
            "onnxruntime-training: not in this environment: this bundle was exported with --engine ort-training and "
            f"needs onnxruntime-training-cpu 1.19.2 in place of onnxruntime, got onnxruntime {version}"
        )
    return bindings


@contextmanager
def graph_errors(what: str) -> Iterator[None]:
    """Turn a failure of the package into one line.

    Raises:
        GraphError: ``what``, and how the package's message begins.
    """
    bindings = load_bindings()
    kinds = tuple(getattr(bindings, name) for name in _FAILURES)
    try:
        yield
    except (RuntimeError, *kinds) as error:
        raise GraphError(f"{what}: {' '.join(str(error).split())[:300]}") from error


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Options of every session of this engine; ``threads`` None means one a core.

    The arena is off as in the block engine. Each session has a thread pool of its own, because this version cannot
    share one from Python; stopping the spin after a run keeps the idle ones from taking the busy one's core.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
