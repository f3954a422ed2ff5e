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
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Name = tuple[str, str, str]  # method, budget, what was left out


@dataclass(frozen=True)
class Split:
    """A data set and how it was divided; ``alpha`` None: as the data itself is."""

    dataset: str
    alpha: float | None

    def __str__(self) -> str:
        return f"{self.dataset}, " + ("natural split" if self.alpha is None else f"Dirichlet {self.alpha:g}")


@dataclass(frozen=True)
class Row:
    """One method on one split, means over its seeds.

    Attributes:
        name: Method, budget, what was left out.
        seeds: Which seeds.
        accuracy: At the end, all test texts.
        apart: Mean difference of accuracy to the reference on the same seeds; None without it.
        apart_95: Half width of that difference's 95 % interval (paired t); None with fewer than two seeds.
        mb: Megabytes both ways.
        bytes_ratio: The reference's bytes over this method's, both ways.
        params_ratio: The same of values, which leaves quantisation out.
        compute: Operations as a share of the reference's.
        rounds_to_95: Rounds until 95 % of the reference's best accuracy, mean; None if a seed never has it.
        drift: Mean over rounds and seeds.
        seconds: Until the same accuracy over each of :data:`LINKS`, mean; None likewise.
    """

    name: Name
    seeds: tuple[int, ...]
    accuracy: float
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
    return list(dict.fromkeys(Split(line.dataset, line.alpha) for line in lines))


def rows_of(lines: Iterable[Line], split: Split) -> list[Row]:
    """The rows of a split in the order of the file, the reference first."""
    mine = [line for line in lines if Split(line.dataset, line.alpha) == split]
    names = dict.fromkeys(_name(line) for line in mine)
    ordered = sorted(mine, key=lambda line: (_name(line) != (REFERENCE, "", ""), list(names).index(_name(line))))
    reference = {line.seed: line for line in mine if _name(line) == (REFERENCE, "", "")}
    return [_row(name, list(group), reference) for name, group in groupby(ordered, key=_name)]


def _name(line: Line) -> Name:
    return line.method, line.budget, line.without


def _row(name: Name, lines: Sequence[Line], reference: dict[int, Line]) -> Row:
    pairs = [(line, reference[line.seed]) for line in lines if line.seed in reference]
    apart = [line.accuracy - other.accuracy for line, other in pairs]
    targets = {seed: 0.95 * max(made.accuracy or 0.0 for made in other.curve) for seed, other in reference.items()}
    drifts = [line.drift for line in lines if line.drift is not None]
    return Row(
        name=name,
        seeds=tuple(line.seed for line in lines),
        accuracy=float(np.mean([line.accuracy for line in lines])),
        apart=float(np.mean(apart)) if apart else None,
        apart_95=half_width(apart),
        mb=float(np.mean([line.bytes_up + line.bytes_down for line in lines])) / 1e6,
        bytes_ratio=_ratio([(_bytes(other), _bytes(line)) for line, other in pairs]),
        params_ratio=_ratio([(_params(other), _params(line)) for line, other in pairs]),
        compute=_ratio([(line.device_gflop, other.device_gflop) for line, other in pairs]),
        rounds_to_95=_mean([_rounds_to(line, targets[line.seed]) for line, _ in pairs]),
        drift=float(np.mean(drifts)) if drifts else None,
        seconds=tuple(
            _mean([seconds_to(line, targets[line.seed], link, cohort=COHORT) for line, _ in pairs]) for link in LINKS
        ),
    )


def half_width(differences: Sequence[float]) -> float | None:
    """Of the 95 % interval of their mean by Student's t; None for fewer than two, or more than ten."""
    points = _T95.get(len(differences) - 1)
    return None if points is None else points * float(np.std(differences, ddof=1)) / len(differences) ** 0.5


def _bytes(line: Line) -> int:
    return line.bytes_up + line.bytes_down


def _params(line: Line) -> int:
    return line.params_up + line.params_down


def _ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Sum over sum."""
    below = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / below if below else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _rounds_to(line: Line, accuracy: float) -> float | None:
    reached = (n for n, made in enumerate(line.curve, start=1) if (made.accuracy or 0.0) >= accuracy)
    return next(reached, None)
