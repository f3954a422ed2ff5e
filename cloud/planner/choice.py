"""What a policy sees and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from cloud.planner.aggregation import AGGREGATIONS, Alive
from cloud.planner.annealing import Annealing, lowest_block
from cloud.planner.scores import PastRound
from edge_runtime.bundle import Manifest
from edge_runtime.wire import ModulePlan


@dataclass(frozen=True)
class Situation:
    """All a policy may look at; equal situations give equal choices, so a run can be replayed."""

    manifest: Manifest
    ranks: dict[str, int]  # of the current adapter, by module
    aggregation: str
    round: int
    rounds: int
    seed: int
    annealing: Annealing = field(default_factory=Annealing)
    head_frozen: bool = False  # whatever the policy
    full_rank: int | None = None  # of the task; None: the bundle's r_max
    energies: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # singular values of s·B·A, by module
    past: tuple[PastRound, ...] = ()  # every applied round

    @cached_property
    def ages(self) -> dict[str, int]:
        """In how many rounds in a row before this one each module was trained; 0 for one that is dead or new.

        One that lived and that too few devices carried begins anew, too: what it was to train is still to be trained.
        """
        ages = dict.fromkeys(self.names, 0)
        for round_ in self.past:
            for module in round_.modules:
                ages[module.name] = ages[module.name] + 1 if round_.carried(module) else 0
        return ages

    @property
    def cycle(self) -> int:
        """Rounds in which a module trains each of its factors once."""
        return len(AGGREGATIONS[self.aggregation])

    def factor(self, name: str) -> Alive:
        """What a module trains in this round if it lives; its first living round trains B."""
        return AGGREGATIONS[self.aggregation][self.ages[name] % self.cycle]

    def unfinished(self, name: str) -> bool:
        """Whether a module lives and has not yet trained each of its factors equally often: it may not be killed."""
        return self.ages[name] % self.cycle != 0

    @cached_property
    def deep(self) -> frozenset[str]:
        """Modules of blocks that lie too deep to be trained in this round, whatever they move."""
        manifest = self.manifest
        lowest = lowest_block(self.annealing, manifest.module_blocks, self.round, self.rounds)
        return frozenset(module.name for module in manifest.modules if module.block < lowest)

    @property
    def trains_head(self) -> bool:
        """Whether the bundle has a head to train, and the task trains it."""
        return self.manifest.head.module is not None and not self.head_frozen

    @property
    def initiating_mu(self) -> float | None:
        """The pull towards the round's start in the initiating rounds, where one is set for them."""
        settings = self.annealing
        return settings.initiating_mu or None if self.round < settings.initiating_rounds else None

    @property
    def names(self) -> tuple[str, ...]:
        """The modules in plan order."""
        return self.manifest.module_names

    @property
    def component_sizes(self) -> dict[str, int]:
        """Parameters of one component of every module: a row of A and a column of B."""
        return {name: sum(features) for name, features in self.manifest.features.items()}

    @property
    def full_parameters(self) -> int:
        """Parameters of all modules at the task's rank."""
        return (self.full_rank or self.manifest.r_max) * sum(self.component_sizes.values())


@dataclass(frozen=True)
class Choice:
    """Rank and alive factors of every module, in the manifest's order, and whether the head is trained.

    ``mu`` replaces the config's pull towards the round's start where the policy wants another one.
    """

    modules: tuple[ModulePlan, ...]
    head_alive: bool
    mu: float | None = None


Policy = Callable[[Situation], Choice]
