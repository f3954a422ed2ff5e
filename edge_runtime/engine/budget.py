"""Time against memory: what a budget is spent on, most profitable first.

First the frozen weights: they are mapped from the bundle's file, and if they fit they stay in memory between steps;
otherwise the pages of a block are given back after each use and read again. What is left keeps activations, block by
block from the top; a block that gets none computes them again in the backward pass, which costs about a third of a
step when it is all blocks. Packed weights, where they are asked for, may take
half of what is left for activations, as many blocks from the top as that holds.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

_SHARE = 0.6  # of free memory: the rest is for the optimizer, temporaries, and whoever else works on this machine
COPIES = 2  # of packed weights: one for the products of the forward pass, one for those of the input gradient
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Allowance:
    """What a budget allows.

    Attributes:
        resident: Whether mapped weights may stay in memory between uses.
        activations: Bytes for kept activations.
    """

    resident: bool
    activations: int


def share_out(budget_mb: int | None, weight_bytes: int) -> Allowance:
    """Spend a budget.

    Args:
        budget_mb: MiB; None stands for :func:`default_budget_mb`.
        weight_bytes: Size of the bundle's frozen weights.
    """
    budget = (default_budget_mb() if budget_mb is None else budget_mb) << 20
    if weight_bytes > budget:
        return Allowance(resident=False, activations=budget)
    return Allowance(resident=True, activations=budget - weight_bytes)


class KeptSizes:
    """How much blocks keep, learned while they run, and which of them may keep it.

    A block is known by its variant. One that has not run yet is taken to keep as much as the largest known one of the
    same sequence length; when none is known it is let keep, and the next decision knows.
    """

    def __init__(self, budget: int) -> None:
        """Args: bytes for the kept activations of all blocks together."""
        self._budget = budget
        self._example_bytes: dict[tuple[Hashable, int], float] = {}

    def learn(self, variant: Hashable, shape: tuple[int, int], size: int) -> bool:
        """Note that a block kept ``size`` bytes for a batch of (examples, tokens).

        Returns:
            Whether that is news: if not, every decision stays as it was.
        """
        examples, tokens = shape
        before = self._example_bytes.get((variant, tokens))
        self._example_bytes[variant, tokens] = size / examples
        return before != size / examples

    def first_kept(self, variants: Sequence[Hashable], shape: tuple[int, int]) -> int:
        """Number of the lowest block that keeps its activations, of ``variants`` from the lowest up.

        The highest are kept: theirs are dropped first, before the lower blocks compute theirs again.
        """
        examples, tokens = shape
        known = [size for (_, length), size in self._example_bytes.items() if length == tokens]
        guess = max(known, default=0.0)
        left = float(self._budget)
        for index in reversed(range(len(variants))):
            left -= examples * self._example_bytes.get((variants[index], tokens), guess)
            if left < 0 or not self._budget:
                return index + 1
        return 0


def packed_from(left: int, block_bytes: Sequence[int]) -> int:
    """Number of the lowest block whose weights are packed.

    Args:
        left: Bytes.
        block_bytes: Size of each block's weights.
    """
    for index in reversed(range(len(block_bytes))):
        left -= COPIES * block_bytes[index]
        if left < 0:
            return index + 1
    return 0


def default_budget_mb() -> int:
    """60 % of the memory that is free now, in MiB; where the system does not tell, of a quarter of all memory."""
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(int(line.split()[1]) / 1024 * _SHARE)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4 / (1 << 20) * _SHARE)
