"""What a rule of outliers says of rounds: of honest devices, and of some that send something else. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from cloud.aggregate import Imprint, Part
from cloud.outliers import Outliers, judge

Imprints = Mapping[str, Imprint]

COSINES = (-0.05, -0.10, -0.15, -0.20, -0.30)
FACTORS = (3.0, 5.0, 10.0)
HOSTILE = 2  # devices a draw
TIMES = 100.0
_ALL_NORMS = Outliers(enabled=True, norm_factor=0.0, min_cosine=-2.0)
_ALL_COSINES = Outliers(enabled=True, norm_factor=np.inf, min_cosine=2.0)


class Rule(msgspec.Struct, frozen=True):
    """What one bound does.

    Attributes:
        bound: ``min_cosine`` or ``norm_factor``.
        found: Of the hostile devices, the share that is set aside.
        aside: Of the honest devices in the same rounds, the share that is.
        honest: The same in rounds without hostile ones.
    """

    bound: float
    found: float
    aside: float
    honest: float


@dataclass
class Figures:
    """Of the rounds that were looked at so far.

    Attributes:
        norms: Of each device and round, over the round's median.
        cosines: Of each device and round, with the mean direction of the others.
    """

    norms: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)

    def add(self, imprints: Imprints) -> None:
        """Take a round's devices in; those that moved nothing are not judged, and not here."""
        for outlier in judge(imprints, _ALL_NORMS, least=0).outliers:
            self.norms.append(outlier.measured)
        for outlier in judge(imprints, _ALL_COSINES, least=0).outliers:
            self.cosines.append(outlier.measured)


def turned(imprint: Imprint) -> Imprint:
    """What the update that is turned around leaves."""
    return Imprint(imprint.tier, tuple(Part(part.norm, -part.sketch) for part in imprint.parts))


def enlarged(imprint: Imprint) -> Imprint:
    """What an update of ``TIMES`` the size leaves."""
    return Imprint(imprint.tier, tuple(Part(TIMES * part.norm, part.sketch) for part in imprint.parts))


def directions(rounds: Sequence[Imprints], rng: np.random.Generator, draws: int) -> tuple[Rule, ...]:
    """What each of ``COSINES`` finds of devices that are turned around."""
    rules = [Outliers(enabled=True, norm_factor=np.inf, min_cosine=bound) for bound in COSINES]
    return tuple(_rule(rule, rule.min_cosine, rounds, turned, _draws(rounds, rng, draws)) for rule in rules)


def norms(rounds: Sequence[Imprints], rng: np.random.Generator, draws: int) -> tuple[Rule, ...]:
    """What each of ``FACTORS`` finds of devices that send ``TIMES`` as much."""
    rules = [Outliers(enabled=True, norm_factor=bound, min_cosine=-2.0) for bound in FACTORS]
    return tuple(_rule(rule, rule.norm_factor, rounds, enlarged, _draws(rounds, rng, draws)) for rule in rules)


Draw = tuple[Imprints, frozenset[str]]  # a round, and who is hostile in it


def _draws(rounds: Sequence[Imprints], rng: np.random.Generator, draws: int) -> Iterator[Draw]:
    for imprints in rounds:
        for _ in range(draws):
            yield imprints, frozenset(map(str, rng.choice(sorted(imprints), size=HOSTILE, replace=False)))


def _rule(
    rule: Outliers,
    bound: float,
    rounds: Sequence[Imprints],
    change: Callable[[Imprint], Imprint],
    draws: Iterator[Draw],
) -> Rule:
    found, aside, hostile_total, honest_total = 0, 0, 0, 0
    for imprints, hostile in draws:
        came = {name: change(imprint) if name in hostile else imprint for name, imprint in imprints.items()}
        gone = judge(came, rule, least=0).aside
        found += len(gone & hostile)
        aside += len(gone - hostile)
        hostile_total += len(hostile)
        honest_total += len(imprints) - len(hostile)
    alone = sum(len(judge(imprints, rule, least=0).aside) for imprints in rounds)
    devices = sum(map(len, rounds))
    return Rule(bound, round(found / hostile_total, 4), round(aside / honest_total, 5), round(alone / devices, 5))
