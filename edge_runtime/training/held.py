"""A child that does not outlive its parent, however that ends.

The parent holds the other end of the child's standard input and writes nothing. When it is gone, also by ``kill -9``,
the system closes that end, and the child ends at once: nobody would take what it makes, and a second device process on
the same home, with a child of its own, would find it in its memory and its scratch folder.
"""

from __future__ import annotations

import os
import threading

HELD = "--held"  # tells a training child that its standard input is held so
_STDIN = 0


def end_with_parent() -> None:
    """End this process when standard input ends, which somebody holds."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    # Not sys.stdin: Python would not end while a thread waits inside its buffer.
    while os.read(_STDIN, 1):
        pass
    os._exit(1)
