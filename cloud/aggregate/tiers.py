"""The sum of a round whose devices carry parts of its plan: each component has the mean of the devices that sent it.

One sum a tier, each exact and independent of order, so what they make together is, too. A tier carries a part of every
stronger one, and of each block its first rows of A or columns of B (docs/wire.md): that is where its sum is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cloud.aggregate.fixed_point import UpdateSum
from edge_runtime.wire import Layout, Update, UpdateRules
from edge_runtime.wire.components import component_axis, is_factor

Double = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Number = TypeVar("Number", bound=np.generic)

LEAST_CARRIERS = 2  # where a plan has tiers: a mean over one device would be that device's update


@dataclass(frozen=True)
class Carried:
    """By whom the components of a tensor were sent; a tensor that is none of a factor counts as one component.

    Attributes:
        devices: How many, shape (components,).
        weight: Of these together, the same shape.
        trained: Numbers of the components; empty where it is none of a factor.
    """

    devices: Integers
    weight: Integers
    trained: tuple[int, ...] = ()


class RoundSum:
    """Sum of a round's weighted updates, whatever their tiers; memory is at most that of one update a tier."""

    def __init__(self, layouts: Sequence[Layout], rules: UpdateRules) -> None:
        """An empty sum; ``layouts`` are those of the plan's tiers, the whole plan's first."""
        self._layouts = tuple(layouts)
        self._rules = rules
        self._sums = {0: UpdateSum(layouts[0].count, rules)}
        self.least_carriers = LEAST_CARRIERS if len(self._layouts) > 1 else 1

    @property
    def layout(self) -> Layout:
        """Of the whole plan."""
        return self._layouts[0]

    @property
    def devices(self) -> int:
        """Of all tiers."""
        return sum(part.devices for part in self._sums.values())

    @property
    def weight(self) -> int:
        """Of the devices of all tiers."""
        return sum(part.weight for part in self._sums.values())

    def capped(self, weight: int) -> int:
        """The weight as it counts."""
        return self._sums[0].capped(weight)

    def add(self, update: Update) -> None:
        """Add one update, already checked against the plan and its tier's layout.

        Raises:
            ValueError: another shape, or more devices than the rules leave room for; nothing was added then.
        """
        if self.devices >= self._rules.max_devices:
            raise ValueError(f"sum: room for {self._rules.max_devices} devices, got {self.devices + 1}")
        tier = update.metrics.tier
        if tier not in self._sums:
            self._sums[tier] = UpdateSum(self._layouts[tier].count, self._rules)
        self._sums[tier].add(update.values, update.weight)

    def without(self, updates: Iterable[Update]) -> RoundSum:
        """The sum of the others: exactly what it would be if these updates had never been added. This one stays.

        Raises:
            ValueError: more updates than were added.
        """
        gone = RoundSum(self._layouts, self._rules)
        for update in updates:
            gone.add(update)
        strangers = [tier for tier in gone._sums if tier not in self._sums]
        if strangers:
            raise ValueError(f"sum: holds no update of tier {strangers[0]}: cannot take one away")
        rest = RoundSum(self._layouts, self._rules)
        for tier, part in self._sums.items():
            rest._sums[tier] = part.minus(gone._sums[tier]) if tier in gone._sums else part
        return rest

    def sums(self) -> Double:
        """The weighted sum of the whole plan's layout, shape (layout.count,), float64."""
        return self._total() / float(2**self._rules.fraction_bits)

    def mean(self) -> Double:
        """The mean of every component over the devices that sent it, by their weights; 0 where they were too few.

        Shape (layout.count,), float64.
        """
        total, mean = self._total(), np.zeros(self.layout.count)
        scale = float(2**self._rules.fraction_bits)
        sums, means, carried = self.layout.split(total), self.layout.split(mean), self.carried()
        for name, out in means.items():
            found = carried[name]
            divisor = _lying(name, scale * np.maximum(found.weight, 1))
            enough = _lying(name, found.devices >= self.least_carriers)
            np.divide(sums[name], divisor, out=out, where=np.broadcast_to(enough, out.shape))
        return mean

    def carried(self) -> dict[str, Carried]:
        """By whom each tensor's components were sent, by tensor name."""
        parts = [(dict(layout.blocks), part) for layout, part in self._parts()]
        found = {}
        for name, shape in self.layout.blocks:
            count = _components(name, shape)
            devices, weight = np.zeros(count, np.int64), np.zeros(count, np.int64)
            for shapes, part in parts:
                sent = _components(name, shapes[name]) if name in shapes else 0
                devices[:sent] += part.devices
                weight[:sent] += part.weight
            listed = self.layout.components.get(name, tuple(range(count)))
            found[name] = Carried(devices, weight, listed if is_factor(name) else ())
        return found

    def idle(self) -> dict[str, tuple[int, ...]]:
        """Components that the plan trains and too few devices sent, by module; modules without any are left out."""
        found: dict[str, set[int]] = {}
        for name, carried in self.carried().items():
            enough = (carried.devices >= self.least_carriers).tolist()
            few = {number for number, moves in zip(carried.trained, enough, strict=False) if not moves}
            if few:
                found.setdefault(name.rpartition(".")[0], set()).update(few)
        return {module: tuple(sorted(numbers)) for module, numbers in found.items()}

    def _parts(self) -> Iterator[tuple[Layout, UpdateSum]]:
        for tier, part in self._sums.items():
            yield self._layouts[tier], part

    def _total(self) -> Integers:
        """Sum of all tiers as integers, shape (layout.count,)."""
        if len(self._sums) == 1:
            return self._sums[0].total
        total = self._sums[0].total.copy()
        whole = self.layout.split(total)
        for layout, part in list(self._parts())[1:]:
            for name, values in layout.split(part.total).items():
                into = whole[name][tuple(slice(size) for size in values.shape)]
                into[...] = np.add(into, values)
        return total


def _components(name: str, shape: tuple[int, ...]) -> int:
    """How many components a tensor has, rows of A or columns of B; 1 where it is none of a factor."""
    return shape[component_axis(name)] if is_factor(name) else 1


def _lying(name: str, values: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """One value a component, (components,), in the shape that numpy spreads over the tensor."""
    return values[:, None] if name.endswith(".lora_a") else values
