"""Peak memory of this process, sampled while something runs.

On Linux ``RssAnon`` and ``RssFile`` of ``/proc/self/status`` are sampled: private memory apart from mapped weights. On
other systems only the peak of total resident memory is known, and the private figure is None.
"""

from __future__ import annotations

import resource
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_INTERVAL_S = 0.02


@dataclass(frozen=True)
class PeakMemory:
    """MiB; None where the system does not tell."""

    private_mb: float | None
    total_mb: float


class MemorySampler:
    """Samples between ``with`` and the end of its block; :attr:`peak` may be read at any time."""

    def __init__(self) -> None:
        self._private_kb = 0
        self._total_kb = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._sample()
        self._stop.set()
        self._thread.join()

    @property
    def peak(self) -> PeakMemory:
        """The highest values seen so far."""
        if self._total_kb:
            return PeakMemory(self._private_kb / 1024, self._total_kb / 1024)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return PeakMemory(None, peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        try:
            text = _STATUS.read_text()
        except FileNotFoundError:
            return
        fields = dict(line.split(":", 1) for line in text.splitlines() if line.startswith("Rss"))
        private = int(fields["RssAnon"].split()[0])
        self._private_kb = max(self._private_kb, private)
        self._total_kb = max(self._total_kb, private + int(fields["RssFile"].split()[0]))
