"""Which factors of a living module are trained in a round, so that averaging them is exact.

Averaging A and B in the same round averages factors and not products; holding one of them still makes it exact.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_runtime.bundle import Factor


def alternate(round_: int) -> Factor:
    """Even rounds B, odd rounds A (RoLoRA): A is random and B zero at the start, so B has to move first."""
    return "A" if round_ % 2 else "B"


def frozen_a(round_: int) -> Factor:
    """B in every round (FFA-LoRA, arXiv 2403.12313)."""
    del round_
    return "B"


AGGREGATIONS: dict[str, Callable[[int], Factor]] = {"alternate": alternate, "frozen-a": frozen_a}
