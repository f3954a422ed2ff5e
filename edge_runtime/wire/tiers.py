"""Tiers: how much less of a plan a weaker device carries, and which devices that is for. Pure.

A plan is one for all devices. Tier 0 carries all of it; a plan may list further tiers, each of which carries a part of
the one before. Weak devices carry fewer and later blocks: the backward pass ends at the lowest block that is trained.
A device chooses by itself, from the signed plan and what it measured of itself, so nobody has to be told, or believed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec

MAX_TIERS = 16  # besides tier 0
_MOST = 1024  # components of a module


class Tier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tier below 0: what it trains, and the devices that should take it. What is left out bounds nothing."""

    lowest_block: int  # no module of a block below this one is trained
    # Of every module this many components at most: the first ones of those that the plan trains.
    max_rank: int | msgspec.UnsetType = msgspec.UNSET
    # A device that has less memory for training than this, or whose training step takes longer, is meant.
    memory_mib: int | msgspec.UnsetType = msgspec.UNSET
    step_s: float | msgspec.UnsetType = msgspec.UNSET

    @property
    def rank_bound(self) -> int:
        """``max_rank``, or the most there is."""
        return _MOST if self.max_rank is msgspec.UNSET else self.max_rank


def choose_tier(
    tiers: Sequence[Tier], *, memory_mib: float | None = None, step_s: float | None = None, wanted: int = 0
) -> int:
    """The tier a device takes: the weakest that is meant for it, or a weaker one if it wants to.

    What a device does not know of itself puts it into no tier.

    Args:
        tiers: Of the plan, tier 1 first.
        memory_mib: That training on the device may use, in MiB; None: not known.
        step_s: Seconds that a training step of everything takes there; None: not known.
        wanted: The least tier the device's user asks for; one beyond the plan's stands for its weakest.
    """
    meant = (number for number, tier in enumerate(tiers, start=1) if _is_meant(tier, memory_mib, step_s))
    return max(*meant, min(wanted, len(tiers)), 0)


def _is_meant(tier: Tier, memory: float | None, step: float | None) -> bool:
    scarce = tier.memory_mib is not msgspec.UNSET and memory is not None and memory < tier.memory_mib
    slow = tier.step_s is not msgspec.UNSET and step is not None and step > tier.step_s
    return scarce or slow


def tier_problems(tiers: Sequence[Tier]) -> Iterator[str]:
    """What is wrong with the tiers of a plan that has any."""
    if not 1 <= len(tiers) <= MAX_TIERS:
        yield f"tiers must be 1 to {MAX_TIERS}, or left out"
    # Each a part of the one before: then a component that a tier has is in all the stronger ones, too.
    if any(
        after.lowest_block < before.lowest_block or after.rank_bound > before.rank_bound
        for before, after in pairwise((Tier(0), *tiers))
    ):
        yield "a tier must carry a part of the one before"
    if any(tier.rank_bound < 1 or (tier.memory_mib is not msgspec.UNSET and tier.memory_mib < 1) for tier in tiers):
        yield f"a tier's max_rank must be 1 to {_MOST}, its memory_mib at least 1"
    if any(tier.step_s is not msgspec.UNSET and not 0 < tier.step_s < math.inf for tier in tiers):
        yield "a tier's step_s must be more than 0"
