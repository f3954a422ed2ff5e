"""Tiers of a plan: which of the later blocks weaker devices carry, and which devices those are. Pure.

Which tier a device takes is decided on the device, by :func:`edge_runtime.wire.choose_tier` and the plan alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec
from msgspec import UNSET

from cloud.planner.depth import lowest_of
from edge_runtime.bundle import Manifest
from edge_runtime.wire import ModulePlan, Tier
from edge_runtime.wire.tiers import MAX_TIERS


class Tiers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The operator's settings; lists have a value a tier, tier 1 first, and an empty one bounds nothing.

    Shares are those of `emberlora edge bench`: upper half, upper sixth. The thresholds are round figures for models the
    size of MiniLM; what a device of a grade can do with another model, that command says.
    """

    enabled: bool = False  # every device carries everything
    blocks: tuple[float, ...] = (1 / 2, 1 / 6)  # share of the blocks, the last ones, that a tier trains
    max_rank: tuple[int, ...] = ()  # most components a module
    memory_mib: tuple[int, ...] = (1024, 512)  # devices with less memory for training take the tier
    step_s: tuple[float, ...] = (2.0, 8.0)  # and so do those whose training step takes longer


def plan_tiers(
    settings: Tiers, manifest: Manifest, modules: Sequence[ModulePlan]
) -> tuple[Tier, ...] | msgspec.UnsetType:
    """What a plan with these modules says of tiers.

    Every tier carries the uppermost block in which anything is alive, whatever its share, so that no device of a fleet
    of weak ones stays out of a round, and the round ends.
    """
    if not settings.enabled:
        return UNSET
    blocks, places = manifest.module_blocks, manifest.places
    uppermost = max((places[module.name] for module in modules if module.alive), default=blocks[-1])
    return tuple(
        Tier(
            lowest_block=min(uppermost, lowest_of(share, blocks)),
            max_rank=settings.max_rank[number] if settings.max_rank else UNSET,
            memory_mib=settings.memory_mib[number] if settings.memory_mib else UNSET,
            step_s=settings.step_s[number] if settings.step_s else UNSET,
        )
        for number, share in enumerate(settings.blocks)
    )


def tiers_problems(settings: Tiers) -> Iterator[str]:
    """Every way in which the settings are wrong by themselves."""
    count = len(settings.blocks)
    if not 1 <= count <= MAX_TIERS:
        yield f"tiers.blocks: expected 1 to {MAX_TIERS} shares, one a tier, got {count}"
    for name in ("max_rank", "memory_mib", "step_s"):
        given = getattr(settings, name)
        if given and len(given) != count:
            yield f"tiers.{name}: expected {count} values, as many as tiers.blocks, or none, got {len(given)}"
        if not all(0 < value < math.inf for value in given):
            yield f"tiers.{name}: expected more than 0, got {_listed(given)}"
    if not all(0 < share <= 1 for share in settings.blocks):
        yield f"tiers.blocks: expected more than 0 and at most 1, got {_listed(settings.blocks)}"
    rules = {"blocks": True, "max_rank": True, "memory_mib": True, "step_s": False}
    for name, falls in rules.items():
        given = getattr(settings, name)
        if any((after > before) if falls else (after < before) for before, after in pairwise(given)):
            yield f"tiers.{name} must not {'rise' if falls else 'fall'} from one tier to the next: got {_listed(given)}"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
