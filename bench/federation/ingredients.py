"""What each ingredient gives: variants of a method beside the whole method on the same split and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from bench.federation.lines import Key, Line
from bench.federation.variants import INGREDIENTS, OURS, VARIANTS, VARIED

TELLING = 0.006  # two standard errors of a difference in accuracy, on 4,500 texts of which one in 25 changes sides
_SHARE = 0.05


@dataclass(frozen=True)
class Ingredient:
    """A run without it beside the whole method.

    Attributes:
        line: Without it.
        whole: With everything.
    """

    line: Line
    whole: Line

    @property
    def about(self) -> str:
        """What happens in its place."""
        return VARIANTS[self.line.without].about if self.line.without else ""

    @property
    def apart(self) -> float:
        """Accuracy or loss without it, less that with it."""
        return self.line.end - self.whole.end

    @property
    def megabytes(self) -> float:
        """Both ways."""
        return self.line.bytes_both / 1e6

    @property
    def values(self) -> float:
        """Millions, both ways."""
        return self.line.params_both / 1e6

    @property
    def compute(self) -> float:
        """Operations as a share of the whole method's."""
        return self.line.device_gflop / self.whole.device_gflop

    @property
    def gives(self) -> str:
        """What the ingredient gives or costs, in words; differences that one run cannot tell are left out."""
        ours = self.whole
        changes = [
            ("accuracy", ours.end - self.line.end, TELLING, "+.4f"),
            ("of the bytes", ours.bytes_both / self.line.bytes_both - 1, _SHARE, "+.0%"),
            ("of the compute", 1 / self.compute - 1, _SHARE, "+.0%"),
        ]
        told = [f"{change:{form}} {what}" for what, change, least, form in changes if abs(change) >= least]
        return ", ".join(told) or "nothing"

    @property
    def rounds_to_95(self) -> int | None:
        """Rounds until 95 % of what the whole method has learned at best."""
        return self.line.metric.rounds_until(self.whole.nearly, self.line.values)


def ingredients_of(lines: Mapping[Key, Line]) -> list[Ingredient]:
    """The whole method and, in the order of :data:`INGREDIENTS`, those of its variants that have it beside them."""
    mine = [line for line in lines.values() if (line.method, line.budget) == (OURS, VARIED)]
    found = [
        Ingredient(line, lines[_whole(line.key)])
        for without in INGREDIENTS
        for line in mine
        if line.without == without and _whole(line.key) in lines
    ]
    wholes = dict.fromkeys(_whole(ingredient.line.key) for ingredient in found)
    return [*(Ingredient(lines[key], lines[key]) for key in wholes), *found]


def _whole(key: Key) -> Key:
    return msgspec.structs.replace(key, without="")
