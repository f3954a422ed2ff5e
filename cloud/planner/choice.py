"""What a policy sees and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.bundle import Manifest
from edge_runtime.wire import ModulePlan, RoundStatus


@dataclass(frozen=True)
class Situation:
    """All a policy may look at; equal situations give equal choices, so a run can be replayed."""

    manifest: Manifest
    ranks: dict[str, int]  # of the current adapter, by module
    aggregation: str
    round: int
    rounds: int
    seed: int
    history: tuple[RoundStatus, ...] = ()


@dataclass(frozen=True)
class Choice:
    """Rank and alive factors of every module, in the manifest's order, and whether the head is trained."""

    modules: tuple[ModulePlan, ...]
    head_alive: bool


Policy = Callable[[Situation], Choice]
