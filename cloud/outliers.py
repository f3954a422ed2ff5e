"""Which updates of a round are far from the others, by a rule that the operator chooses. Pure.

All are judged at once when the round closes, from one imprint an update (:mod:`cloud.aggregate.sketch`). So the verdict
depends on which updates came, not on the order in which they did, and it is the same after a kill.

- *Norm*: larger than ``norm_factor`` times the median of the round.
- *Direction*: the cosine of the angle between an update and the mean direction of all the others is below
  ``min_cosine``. Every device has one vote there, whatever its weight and norm, and none in its own case; those with
  too large a norm have none at all.

A device is compared in what its tier carries, and in what every weaker tier does, each time with all who carry that:
whoever chooses a tier of its own is still compared with everybody in the weakest one. Where fewer than ``min_devices``
moved anything, nothing is known of who is far from whom, and nobody is judged. An update of zeros moves nothing: it is
neither judged nor counted.

More than half of a round's devices always stay, and at least the task's ``min_devices``. If more would have to go,
those stay that are least beyond the rule, and the verdict names them as kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from cloud.aggregate import Imprint, Part
from edge_runtime.wire import Outlier

Double = npt.NDArray[np.float64]

_LEAST_JUDGED = 4  # of three devices, one that is wrong looks no different from one that is right
_SMALLEST = 1e-6  # a sum of unit vectors that is shorter points nowhere but where rounding sent it
_LARGEST = 1e9  # of what is said; beyond it, by how much does not matter


class Outliers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The operator's rule, ``[outliers]`` of the config. ADR 24 has the figures behind the defaults."""

    enabled: bool = False  # devices with much or rare data are far from others, too; the operator knows his fleet
    norm_factor: float = 5.0  # a tenth of the devices, each just below it, cannot outweigh the others
    min_cosine: float = -0.15  # below what unrelated data, a few opposed peers and the sketch's error make together
    min_devices: int = 8  # of fewer, the median and the mean direction are those of two or three devices


@dataclass(frozen=True)
class Verdict:
    """Who is an outlier, by name, and how many devices were compared with others; 0: too few came."""

    judged: int = 0
    outliers: tuple[Outlier, ...] = ()

    @property
    def aside(self) -> frozenset[str]:
        """Names of the devices whose updates do not count."""
        return frozenset(outlier.device for outlier in self.outliers if not outlier.kept)


@dataclass(frozen=True)
class _Group:
    """The devices that carry what a tier carries and moved it, sorted by name, with these parts of their updates."""

    tier: int
    names: tuple[str, ...]
    parts: tuple[Part, ...]


def outliers_problems(settings: Outliers) -> Iterator[str]:
    """Every way in which the settings are wrong by themselves."""
    if not settings.norm_factor > 1:
        yield f"outliers.norm_factor: expected more than 1, the median itself, got {settings.norm_factor}"
    if not -1 <= settings.min_cosine < 0:
        yield (
            "outliers.min_cosine: expected from -1 to less than 0, which is what devices with different data have, got "
            f"{settings.min_cosine}"
        )
    if settings.min_devices < _LEAST_JUDGED:
        yield f"outliers.min_devices: expected at least {_LEAST_JUDGED}, got {settings.min_devices}"


def judge(imprints: Mapping[str, Imprint], settings: Outliers, *, least: int) -> Verdict:
    """The verdict on a round.

    Args:
        imprints: Of every counted update, by device.
        settings: The rule.
        least: Devices that have to stay, whatever the rule says.
    """
    groups = [group for group in _groups(imprints) if len(group.names) >= settings.min_devices]
    large = _worst(found for group in groups for found in _by_norm(group, settings))
    opposed = _worst(found for group in groups for found in _by_direction(group, settings, large))
    found = sorted(large.values(), key=_badness) + sorted(opposed.values(), key=_badness)
    room = max(len(imprints) - max(least, len(imprints) // 2 + 1), 0)
    kept = [msgspec.structs.replace(outlier, kept=True) for outlier in found[room:]]
    return Verdict(len({name for group in groups for name in group.names}), (*found[:room], *kept))


def _groups(imprints: Mapping[str, Imprint]) -> Iterator[_Group]:
    tiers = max((imprint.tier + len(imprint.parts) for imprint in imprints.values()), default=0)
    for tier in range(tiers):
        carried = {
            name: imprint.parts[tier - imprint.tier]
            for name, imprint in sorted(imprints.items())
            if imprint.tier <= tier
        }
        moved = {name: part for name, part in carried.items() if part.norm > 0}
        yield _Group(tier, tuple(moved), tuple(moved.values()))


def _by_norm(group: _Group, settings: Outliers) -> Iterator[Outlier]:
    median = float(np.median([part.norm for part in group.parts]))
    for name, part in zip(group.names, group.parts, strict=True):
        if part.norm > settings.norm_factor * median:
            times = min(part.norm / median, _LARGEST)
            yield Outlier(name, "norm", round(times, 3), settings.norm_factor, len(group.names), group.tier)


def _by_direction(group: _Group, settings: Outliers, without: Mapping[str, Outlier]) -> Iterator[Outlier]:
    asked = [(name, part) for name, part in zip(group.names, group.parts, strict=True) if name not in without]
    if not asked:
        return
    units = np.array([_unit(part.sketch.astype(np.float64)) for _, part in asked])
    cosines = _leave_one_out(units)
    for (name, _), cosine in zip(asked, cosines, strict=True):
        if cosine < settings.min_cosine:
            yield Outlier(name, "direction", round(cosine, 3), settings.min_cosine, len(group.names), group.tier)


def _leave_one_out(units: Double) -> Sequence[float]:
    """The cosine of each of these unit vectors, shape (devices, WIDTH), with the sum of the others; 0 where there is
    none."""
    total = units.sum(axis=0)
    return [float(unit @ _unit(total - unit)) for unit in units]


def _unit(vector: Double) -> Double:
    length = math.sqrt(float(vector @ vector))
    return vector / length if length > _SMALLEST else np.zeros_like(vector)


def _worst(found: Iterator[Outlier]) -> dict[str, Outlier]:
    """By device, what it is farthest beyond the rule by."""
    worst: dict[str, Outlier] = {}
    for outlier in found:
        known = worst.get(outlier.device)
        if known is None or _badness(outlier) < _badness(known):
            worst[outlier.device] = outlier
    return worst


def _badness(outlier: Outlier) -> tuple[float, str]:
    """Sorts those of one rule, the worst first; of two that are equally bad, by name."""
    return (-outlier.measured if outlier.rule == "norm" else outlier.measured), outlier.device
