"""Policy ``kill-revive``: the budget goes to the modules that still move.

After DLoRA's Kill and Revive (arXiv 2404.05182), whose rules are not published; these are ours. A dead module has no
movement of its own, so it comes back by challenging the weakest of the living as in simulated annealing (Metropolis):
it wins for certain when its last score is as high, and the less probably the lower it is and the cooler the task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set

import numpy as np

from cloud.planner.annealing import known_from
from cloud.planner.choice import Choice, Situation
from cloud.planner.scores import scores
from edge_runtime.wire import ModulePlan


def kill_revive(situation: Situation) -> Choice:
    """After the initiating rounds a budget of ``budget_end`` at the temperature of the start, all the time."""
    settings = situation.annealing
    return choose_lives(situation, lambda _: settings.budget_end, settings.temperature_start)


def choose_lives(situation: Situation, share: Callable[[int], float], heat: float) -> Choice:
    """Give a budget to the modules that move.

    In the initiating rounds all live, until each has trained every factor equally often. From then on lives are decided
    every round, among the modules that are not in the middle of such a cycle of one or two rounds. One that starts a
    cycle lives to its end, so it has to fit the budgets of both rounds, and in the second one beside the best of those
    that end theirs now.

    Args:
        situation: What is known.
        share: Of the adapter at the task's rank that may be alive in a round after the initiating ones.
        heat: Temperature of revival.
    """
    living = _living(situation, share, heat)
    modules = tuple(
        ModulePlan(name, situation.ranks[name], situation.factor(name) if name in living else "")
        for name in situation.names
    )
    return Choice(modules, head_alive=situation.trains_head, mu=situation.initiating_mu)


def _living(situation: Situation, share: Callable[[int], float], heat: float) -> set[str]:
    round_, cycle = situation.round, situation.cycle
    if round_ < known_from(situation.annealing, cycle):
        return set(situation.names) - situation.deep | _held(situation)
    costs = {name: situation.ranks[name] * size for name, size in situation.component_sizes.items()}
    known = scores(situation.past, situation.component_sizes)
    # Of the first cycle nobody is held: one that too few devices carried in it may be in the middle of its own.
    held = _held(situation) if round_ > known_from(situation.annealing, cycle) else set[str]()
    found = {name: known.get(name, 0.0) for name in situation.names if name in held or name not in situation.deep}
    rooms = [share(later) * situation.full_parameters for later in range(round_, round_ + cycle)]
    if held:
        rooms[0] -= sum(costs[name] for name in held)
        rooms[-1] -= costs[max(sorted(held), key=lambda name: found[name])]
    living = survive(found, costs, min(rooms), held=held)
    return challenge(found, costs, living, held=held, heat=heat, rng=np.random.default_rng([situation.seed, round_]))


def _held(situation: Situation) -> set[str]:
    """Modules in the middle of a cycle."""
    return {name for name in situation.names if situation.unfinished(name)}


def survive(
    found: Mapping[str, float], costs: Mapping[str, int], parameters: float, *, held: Set[str] = frozenset()
) -> set[str]:
    """The modules with the best scores that fit; where nothing is held the very best one always.

    Args:
        found: Scores.
        costs: Parameters of every module.
        parameters: How many those may have that are not held.
        held: Modules that live in any case.
    """
    order = sorted((name for name in found if name not in held), key=lambda name: -found[name])  # stable: plan order
    living, left = set(held), parameters
    for name in order:
        if costs[name] <= left or not living:
            living.add(name)
            left -= costs[name]
    return living


def challenge(
    found: Mapping[str, float],
    costs: Mapping[str, int],
    living: Set[str],
    *,
    held: Set[str] = frozenset(),
    heat: float,
    rng: np.random.Generator,
) -> set[str]:
    """Let every dead module challenge the weakest living one, the strongest dead one first.

    A winner takes the other's place if it is no dearer than that, and cannot be challenged itself: it has a whole cycle
    to show what it can do. Nor can one that is in the middle of its own.

    Args:
        found: Scores.
        costs: Parameters of every module.
        living: Who lives before.
        held: Those of them that cannot be challenged.
        heat: Temperature; 0 lets nobody win who is weaker.
        rng: Draws once for every challenge.
    """
    now, safe = set(living), set(held)
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
