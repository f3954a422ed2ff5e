"""What processes write down of themselves: one line each, whole or not at all, that outlives them."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

_NAME = "record.jsonl"


def note(folder: Path, what: str, device: str, **fields: Any) -> None:
    """Append a line; many processes may do so at once."""
    line = json.dumps({"what": what, "device": device, **fields}) + "\n"
    file = os.open(folder / _NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(file, line.encode())  # one call: the kernel does not interleave it with another
    finally:
        os.close(file)


def notes(folder: Path, what: str) -> list[dict[str, Any]]:
    """All lines of a kind, in order."""
    path = folder / _NAME
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line["what"] == what]


def fresh_number(folder: Path) -> int:
    """0, 1, …: a number that no other process of this folder gets."""
    (folder / "numbers").mkdir(exist_ok=True)
    for number in itertools.count():
        try:
            (folder / "numbers" / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        return number
    raise AssertionError("itertools.count does not end")
