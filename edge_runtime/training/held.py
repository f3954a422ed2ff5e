"""The other end of a child's standard input: it brings the job, and the child does not outlive it.

The job is the first line; the parent then keeps its end open. When it is gone, also by ``kill -9``, the system closes
that end, and the child ends at once: nobody would take what it makes, and a second device process on the same home,
with a child of its own, would find it in its memory and its scratch folder.
"""

from __future__ import annotations

import os
import threading

_STDIN = 0
_PIECE = 64 << 10


def read_job() -> bytes:
    """The first line of standard input; less where it ended before that."""
    found = b""
    # Not sys.stdin: Python would not end while a thread waits inside its buffer.
    while not found.endswith(b"\n"):
        piece = os.read(_STDIN, _PIECE)
        if not piece:
            break
        found += piece
    return found


def end_with_parent() -> None:
    """End this process when standard input ends, which somebody holds."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    while os.read(_STDIN, 1):
        pass
    os._exit(1)
