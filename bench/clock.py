"""Time spent inside ONNX Runtime's own code, whichever sessions are run."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from onnxruntime.capi import onnxruntime_pybind11_state as compiled

# One class under all sessions, so that the engine needs no hook for the benchmark. The method of the same name on
# ``onnxruntime.InferenceSession`` would count its Python.
_CLASS, _METHOD = compiled.InferenceSession, "run_with_ortvaluevector"


class RuntimeClock:
    """Runs between ``with`` and the end of its block, in the one thread that runs sessions.

    Attributes:
        seconds: In ONNX Runtime so far.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """Not running yet; ``now`` tells seconds."""
        self.seconds = 0.0
        self._now = now
        self._method: Any = None

    def __enter__(self) -> RuntimeClock:
        self._method = method = getattr(_CLASS, _METHOD)
        now = self._now

        def timed(session: Any, *arguments: Any) -> Any:
            began = now()
            try:
                return method(session, *arguments)
            finally:
                self.seconds += now() - began

        setattr(_CLASS, _METHOD, timed)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        setattr(_CLASS, _METHOD, self._method)
