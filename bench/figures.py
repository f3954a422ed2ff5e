"""Single figures with the goal they are held against: one JSON object a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from bench.host import commit, describe_host
from bench.jsonl import append_line


class Figure(msgspec.Struct, frozen=True):
    """One measured value.

    Attributes:
        case: What was measured.
        value: How much, in ``unit``.
        unit: "MB" are 10⁶ bytes, "MiB" 2²⁰; "s" seconds; "ratio" of two values of one unit.
        goal: At most this; None where there is no goal.
        detail: What the value is made of, units in the names.
    """

    case: str
    value: float
    unit: str
    goal: float | None = None
    detail: dict[str, Any] = {}


def append_figure(path: Path, figure: Figure, *, threads: int, quick: bool) -> str:
    """Append a line with where and from what it was measured; return its text."""
    fields = {**msgspec.to_builtins(figure), "host": describe_host(threads), "commit": commit(), "quick": quick}
    return append_line(path, fields)
