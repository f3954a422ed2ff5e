"""What other methods had learned when they had sent and fetched as many bytes as one has at its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.federation.lines import Line
from bench.federation.summary import Name, half_width, place_of


@dataclass(frozen=True)
class Rival:
    """A method beside the one that gives the bytes, means over the runs that both have.

    Attributes:
        name: Method, budget, what was left out.
        runs: How many.
        rounds: That it had had by then.
        apart: Its accuracy or loss then, on the part of the held-out texts that is measured on the way, less the
            other's at its end, measured on the same texts.
        apart_95: Half width of the 95 % interval (paired t); None with fewer than two runs.
    """

    name: Name
    runs: int
    rounds: float
    apart: float
    apart_95: float | None


def rivals_of(lines: Iterable[Line], name: Name) -> list[Rival]:
    """Every other method at the bytes of ``name``, in the order of the file."""
    by_name: dict[Name, list[Line]] = {}
    for line in lines:
        by_name.setdefault((line.method, line.budget, line.without), []).append(line)
    own = {place_of(line): line for line in by_name.pop(name, [])}
    found = []
    for other, theirs in by_name.items():
        pairs = [(line, own[place_of(line)]) for line in theirs if place_of(line) in own]
        if pairs:
            found.append(_rival(other, pairs))
    return found


def _rival(name: Name, pairs: Sequence[tuple[Line, Line]]) -> Rival:
    reached = [_reached(line, own.bytes_both) for line, own in pairs]
    apart = [value - _last(own) for (_, value), (_, own) in zip(reached, pairs, strict=True)]
    return Rival(
        name, len(pairs), float(np.mean([rounds for rounds, _ in reached])), float(np.mean(apart)), half_width(apart)
    )


def _last(line: Line) -> float:
    return next(value for value in reversed(line.values) if value is not None)


def _reached(line: Line, allowed: int) -> tuple[int, float]:
    """Rounds that fit into so many bytes, and the best that was measured in them, or before the first."""
    spent, rounds, best = 0, 0, line.start
    for made in line.curve:
        spent += made.bytes_both
        if spent > allowed:
            break
        rounds += 1
        best = line.metric.best((best, made.value))
    return rounds, best
