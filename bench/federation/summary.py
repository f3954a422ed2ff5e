"""Rows over seeds: every method beside ``lora-r8`` of the same seeds, with paired intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from bench.federation.lines import Line
from bench.federation.links import Link, seconds_to

REFERENCE = "lora-r8"
COHORT = 5  # devices a round
LINKS = (Link(1.0), Link(10.0))
# Two-sided 95 % points of Student's t by degrees of freedom: seeds are few.
_T95 = dict(
    enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145), 1)
)

Name = tuple[str, str, str]  # method, budget, what was left out


@dataclass(frozen=True)
class Split:
    """A data set and how it was divided; ``alpha`` None: as the data itself is."""

    dataset: str
    alpha: float | None

    def __str__(self) -> str:
        return f"{self.dataset}, " + ("natural split" if self.alpha is None else f"Dirichlet {self.alpha:g}")


Place = tuple[Split, int]  # and the seed


@dataclass(frozen=True)
class Row:
    """One method on one split, or on all of them, means over its runs.

    Attributes:
        name: Method, budget, what was left out.
        seeds: Of the runs, one a run.
        end: Accuracy or loss at the end, on all that is held out.
        apart: Mean difference of that to the reference on the same seeds; None without it.
        apart_95: Half width of that difference's 95 % interval (paired t); None with fewer than two seeds.
        mb: Megabytes both ways.
        bytes_ratio: The reference's bytes over this method's, both ways.
        params_ratio: The same of values, which leaves quantisation out.
        compute: Operations as a share of the reference's.
        rounds_to_95: Rounds until 95 % of what the reference has learned at best, mean; None if a seed never has it.
        drift: Mean over rounds and seeds.
        seconds: Until the same over each of :data:`LINKS`, mean; None likewise.
    """

    name: Name
    seeds: tuple[int, ...]
    end: float
    apart: float | None
    apart_95: float | None
    mb: float
    bytes_ratio: float | None
    params_ratio: float | None
    compute: float | None
    rounds_to_95: float | None
    drift: float | None
    seconds: tuple[float | None, ...]


def splits_of(lines: Iterable[Line]) -> list[Split]:
    """Every split that there is a line of, in the order of the file."""
    return list(dict.fromkeys(map(split_of, lines)))


def rows_of(lines: Iterable[Line], split: Split | None) -> list[Row]:
    """The rows of a split in the order of the file, the reference first; None: of all splits together.

    Lines that make one row are judged by the same metric.
    """
    mine = [line for line in lines if split in (None, split_of(line))]
    names = dict.fromkeys(_name(line) for line in mine)
    ordered = sorted(mine, key=lambda line: (_name(line) != (REFERENCE, "", ""), list(names).index(_name(line))))
    reference = {place_of(line): line for line in mine if _name(line) == (REFERENCE, "", "")}
    return [_row(name, list(group), reference) for name, group in groupby(ordered, key=_name)]


def shared_by_all(lines: Sequence[Line]) -> list[Line]:
    """Those on splits and seeds on which every method has a run: means over others are of different things."""
    names = set(map(_name, lines))
    there: dict[Place, set[Name]] = {}
    for line in lines:
        there.setdefault(place_of(line), set()).add(_name(line))
    return [line for line in lines if there[place_of(line)] == names]


def split_of(line: Line) -> Split:
    """What a run was made on."""
    return Split(line.dataset, line.alpha)


def place_of(line: Line) -> Place:
    """What runs of different methods must share to be compared."""
    return split_of(line), line.seed


def _name(line: Line) -> Name:
    return line.method, line.budget, line.without


def _row(name: Name, lines: Sequence[Line], reference: dict[Place, Line]) -> Row:
    pairs = [(line, reference[place_of(line)]) for line in lines if place_of(line) in reference]
    apart = [line.end - other.end for line, other in pairs]
    targets = {place: other.nearly for place, other in reference.items()}
    drifts = [line.drift for line in lines if line.drift is not None]
    return Row(
        name=name,
        seeds=tuple(line.seed for line in lines),
        end=float(np.mean([line.end for line in lines])),
        apart=float(np.mean(apart)) if apart else None,
        apart_95=half_width(apart),
        mb=float(np.mean([line.bytes_both for line in lines])) / 1e6,
        bytes_ratio=_ratio([(other.bytes_both, line.bytes_both) for line, other in pairs]),
        params_ratio=_ratio([(other.params_both, line.params_both) for line, other in pairs]),
        compute=_ratio([(line.device_gflop, other.device_gflop) for line, other in pairs]),
        rounds_to_95=_mean([line.metric.rounds_until(targets[place_of(line)], line.values) for line, _ in pairs]),
        drift=float(np.mean(drifts)) if drifts else None,
        seconds=tuple(
            _mean([seconds_to(line, targets[place_of(line)], link, cohort=COHORT) for line, _ in pairs])
            for link in LINKS
        ),
    )


def half_width(differences: Sequence[float]) -> float | None:
    """Of the 95 % interval of their mean by Student's t; None for fewer than two, or more than fifteen."""
    points = _T95.get(len(differences) - 1)
    return None if points is None else points * float(np.std(differences, ddof=1)) / len(differences) ** 0.5


def _ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Sum over sum."""
    below = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / below if below else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
