"""Policy ``kill-revive``: the budget goes to the modules that still move.

After DLoRA's Kill and Revive (arXiv 2404.05182), whose rules are not published; these are ours. A dead module has no
movement of its own, so it comes back by challenging the weakest of the living as in simulated annealing (Metropolis):
it wins for certain when its last score is as high, and the less probably the lower it is and the cooler the task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from cloud.planner.choice import Choice, Situation
from cloud.planner.scores import scores
from edge_runtime.wire import ModulePlan


def kill_revive(situation: Situation) -> Choice:
    """After the initiating rounds a budget of ``budget_end`` at the temperature of the start, all the time."""
    settings = situation.annealing
    share = settings.budget_start if situation.round < settings.initiating_rounds else settings.budget_end
    return choose_lives(situation, share, settings.temperature_start)


def choose_lives(situation: Situation, share: float, heat: float) -> Choice:
    """Give a budget to the modules that move.

    Lives are decided in even rounds, so that each lasts for a pair that trains B and then A.

    Args:
        situation: What is known.
        share: Of the adapter at the task's rank that may be alive.
        heat: Temperature of revival.
    """
    round_, settings = situation.round, situation.annealing
    if round_ < settings.initiating_rounds or not situation.past:
        living = set(situation.names)
    elif round_ % 2:
        living = {module.name for module in situation.past[-1].modules if module.alive}
    else:
        rng = np.random.default_rng([situation.seed, round_])
        costs = {name: situation.ranks[name] * size for name, size in situation.component_sizes.items()}
        known = scores(situation.past, situation.component_sizes)
        found = {name: known.get(name, 0.0) for name in situation.names}
        survivors = survive(found, costs, share * situation.full_parameters)
        living = challenge(found, costs, survivors, heat=heat, rng=rng)
    modules = tuple(
        ModulePlan(name, situation.ranks[name], situation.factor if name in living else "") for name in situation.names
    )
    return Choice(modules, head_alive=situation.trains_head, mu=situation.initiating_mu)


def survive(found: Mapping[str, float], costs: Mapping[str, int], parameters: float) -> set[str]:
    """The modules with the best scores that fit; the very best one always."""
    order = sorted(found, key=lambda name: -found[name])  # stable: equal ones in plan order
    living, left = {order[0]}, parameters - costs[order[0]]
    for name in order[1:]:
        if costs[name] <= left:
            living.add(name)
            left -= costs[name]
    return living


def challenge(
    found: Mapping[str, float],
    costs: Mapping[str, int],
    living: set[str],
    *,
    heat: float,
    rng: np.random.Generator,
) -> set[str]:
    """Let every dead module challenge the weakest living one, the strongest dead one first.

    A winner takes the other's place if it is no dearer than that, and cannot be challenged itself: it has a pair of
    rounds to show what it can do.

    Args:
        found: Scores.
        costs: Parameters of every module.
        living: Who lives before.
        heat: Temperature; 0 lets nobody win who is weaker.
        rng: Draws once for every challenge.
    """
    now, safe = set(living), set[str]()
    mean = sum(found[name] for name in living) / len(living)
    for name in sorted(set(found) - living, key=lambda dead: (-found[dead], dead)):
        draw = rng.random()
        rivals = [rival for rival in now - safe if costs[name] <= costs[rival]]
        if not rivals:
            continue
        weakest = min(rivals, key=lambda rival: (found[rival], rival))
        gap = max(0.0, found[weakest] - found[name])
        chance = 1.0 if gap == 0 else math.exp(-gap / (heat * mean)) if heat * mean > 0 else 0.0
        if draw < chance:
            now = (now - {weakest}) | {name}
            safe.add(name)
    return now
