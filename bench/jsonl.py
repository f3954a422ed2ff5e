"""Files of results: a JSON object a line, appended by as many processes as there are."""

from __future__ import annotations

import fcntl
from pathlib import Path

import msgspec


def append_line(path: Path, line: object) -> str:
    """Append a line and return its text. A last line that has no end, of a run that was killed, is cut off first.

    Args:
        path: The file; it and its folder are made where there are none.
        line: What msgspec can write as JSON.
    """
    text = msgspec.json.encode(line).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(text.encode() + b"\n")
    return text
