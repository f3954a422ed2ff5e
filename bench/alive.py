"""What is alive in a measured step: the topmost part of the modules, scattered ones, or one factor of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from bench.errors import RequestError
from bench.shapes import SLOTS, module_name

WHOLE = "1"  # the pattern with everything alive
SCATTERED = "scattered"
_FACTORS = ("A", "B")
_SEED = 0


@dataclass(frozen=True)
class Alive:
    """A choice of alive factors.

    Attributes:
        pattern: As asked for, "1/6", "scattered" or "B".
        factors: Alive factors of every module by name, "AB", "A", "B" or "".
    """

    pattern: str
    factors: dict[str, str]

    @property
    def fraction(self) -> float:
        """Alive factors of all factors, from 0 to 1."""
        return sum(len(factors) for factors in self.factors.values()) / (2 * len(self.factors))

    @property
    def lowest_block_dead(self) -> bool:
        """Whether there are blocks below the lowest alive one, whose output may be remembered."""
        return not any(self.factors[module_name(0, slot)] for slot in SLOTS)


def parse_alive(text: str, modules: Sequence[str]) -> list[Alive]:
    """Read a list such as ``1,3/4,1/6,scattered,B``.

    A fraction keeps that part of the modules alive from the top, at least one; halves round up. ``scattered`` kills
    half of the modules, drawn with a fixed seed; ``A`` and ``B`` keep that factor of every module.

    Args:
        text: What to measure, comma-separated.
        modules: Names of all modules from the bottom up.

    Raises:
        RequestError: an item is none of these.
    """
    return [_alive(item, modules) for item in dict.fromkeys(item.strip() for item in text.split(","))]


def _alive(pattern: str, modules: Sequence[str]) -> Alive:
    if pattern in _FACTORS:
        return Alive(pattern, dict.fromkeys(modules, pattern))
    if pattern == SCATTERED:
        chosen = set(random.Random(_SEED).sample(modules, (len(modules) + 1) // 2))
        return Alive(pattern, {name: "AB" if name in chosen else "" for name in modules})
    dead = len(modules) - max(1, int(_part(pattern) * len(modules) + Fraction(1, 2)))
    return Alive(pattern, {name: "AB" if place >= dead else "" for place, name in enumerate(modules)})


def _part(pattern: str) -> Fraction:
    try:
        part = Fraction(pattern)
    except (ValueError, ZeroDivisionError) as error:
        raise RequestError(f"--alive: expected a fraction, {SCATTERED}, A or B, got {pattern!r}") from error
    if not 0 < part <= 1:
        raise RequestError(f"--alive: expected a fraction above 0 and up to 1, got {pattern}")
    return part
