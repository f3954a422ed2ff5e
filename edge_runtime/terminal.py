"""What a person sees of a running command: lines, and one progress line that is written over.

Plain text and carriage returns, so that a device needs no terminal library. Away from a terminal there are only lines.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TextIO

_REDRAW_S = 0.1  # not at every step: terminals over slow lines are terminals too
_BAR_CHARS = 24
_FALLBACK_COLUMNS = 80


class Terminal:
    """A stream that a person may be reading."""

    def __init__(self, stream: TextIO, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is written yet.

        Args:
            stream: Where to.
            quiet: Write nothing at all.
            clock: Seconds that never go back.
        """
        self._stream = stream
        self._quiet = quiet
        self._clock = clock
        self._live = stream.isatty() and not quiet
        self._began: tuple[float, int] | None = None  # time and step of the first progress
        self._drawn_at = 0.0
        self._width = 0  # of what stands on the progress line

    def say(self, line: str) -> None:
        """Write a line; a progress line gives way and comes back below it."""
        if not self._quiet:
            self._erase()
            self._write(line + "\n")

    def progress(self, done: int, total: int, text: str) -> None:
        """Show that ``done`` of ``total`` steps are done; ``text`` stands before the bar."""
        if not self._live:
            return
        now = self._clock()
        if self._began is None:
            self._began = (now, done)
        elif now - self._drawn_at < _REDRAW_S and done < total:
            return
        self._drawn_at = now
        began, first = self._began
        left = (now - began) / (done - first) * (total - done) if done > first else None
        line = f"{text} {_bar(done, total, self._stream.encoding)} {done}/{total} {_minutes(left)}"
        line = line[: self._columns() - 1]
        self._write("\r" + line.ljust(self._width))
        self._width = len(line)

    def close(self) -> None:
        """End a progress; its line is erased."""
        self._erase()
        self._began = None

    def _erase(self) -> None:
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _FALLBACK_COLUMNS
        except OSError:  # a stream without a file, or one that has no size
            return _FALLBACK_COLUMNS


def _bar(done: int, total: int, encoding: str | None) -> str:
    full, empty = ("█", "░") if (encoding or "").lower().startswith("utf") else ("#", "-")
    filled = _BAR_CHARS * done // max(total, 1)
    return full * filled + empty * (_BAR_CHARS - filled)


def _minutes(seconds: float | None) -> str:
    """Time left as minutes and seconds."""
    return "-:--" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02}"
