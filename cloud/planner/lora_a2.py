"""Policy ``lora-a2``: a budget of components over all modules together, after LoRA-A² (arXiv 2410.22815).

Every module keeps the task's rank in the forward pass. The components that matter most are trained and sent; a module
may get many of them or none. Importance is movement, |ΔB_:,j|·|A_j,:| or |B_:,j|·|ΔA_j,:|. In the paper every device
ranks components by what an epoch of its own moved, in which it trains all of them, and sends those it chose; devices
with different data so send different ones, which is part of the paper's point. Here the server chooses, the same for
all devices, by what their mean moved: no extra epoch, and sums are all it sees. What is not trained does not move, so
scores fade and a part of the budget goes to components at random, where the paper scores all of them anew each round.

It reads ``budget_end`` of ``[annealing]``, a share of all components, in every round; it neither anneals nor initiates.
"""

from __future__ import annotations

import numpy as np
from msgspec import UNSET

from cloud.planner.choice import Choice, Situation
from cloud.planner.scores import Component, component_scores
from edge_runtime.wire import ModulePlan

EXPLORED = 8  # one component in so many is chosen at random, at least one: others cannot show that they would move


def lora_a2(situation: Situation) -> Choice:
    """The components with the best scores that the budget allows, each until it has trained every factor once."""
    trained = _held(situation) if situation.past and situation.round % situation.cycle else _chosen(situation)
    modules = tuple(
        _module(situation, name, sorted(number for owner, number in trained if owner == name))
        for name in situation.names
    )
    return Choice(modules, head_alive=situation.trains_head)


def component_budget(situation: Situation) -> int:
    """How many components may be trained in a round; one at least."""
    whole = (situation.full_rank or situation.manifest.r_max) * len(situation.names)
    return min(components_of(situation.annealing.budget_end, whole), sum(situation.ranks.values()))


def components_of(share: float, whole: int) -> int:
    """How many components a share of the whole is; one at least."""
    return max(int(share * whole + 1e-9), 1)  # 0.29 of 100 is 29


def _held(situation: Situation) -> set[Component]:
    """What the round before trained: the cycle that it began goes on."""
    last = situation.past[-1].modules
    return {(module.name, number) for module in last if module.alive for number in module.trained_components}


def _chosen(situation: Situation) -> set[Component]:
    budget = component_budget(situation)
    known = component_scores(situation.past, situation.ranks)
    # By number first: where scores are equal, as before anything has moved, modules take turns.
    every = [
        (name, number)
        for number in range(max(situation.ranks.values()))
        for name in situation.names
        if number < situation.ranks[name]
    ]
    order = sorted(every, key=lambda component: -known.get(component, 0.0))  # stable
    explored = max(1, budget // EXPLORED) if known and budget < len(every) else 0
    best, rest = order[: budget - explored], order[budget - explored :]
    drawn = np.random.default_rng([situation.seed, situation.round]).choice(len(rest), explored, replace=False)
    return {*best, *(rest[place] for place in drawn)}


def _module(situation: Situation, name: str, numbers: list[int]) -> ModulePlan:
    rank = situation.ranks[name]
    if not numbers:
        return ModulePlan(name, rank, "")
    return ModulePlan(name, rank, situation.factor(name), UNSET if len(numbers) == rank else tuple(numbers))
