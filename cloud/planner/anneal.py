"""Policy ``anneal``: ranks fall with the budget, the components with least energy first; modules die of depth alone."""

from __future__ import annotations

from collections.abc import Mapping

from cloud.planner.annealing import budget_share, hottest
from cloud.planner.choice import Choice, Situation
from edge_runtime.wire import ModulePlan


def anneal(situation: Situation) -> Choice:
    """All modules that do not lie too deep at ranks that fit the round's budget, and the head if the bundle trains one.

    Ranks change in even rounds only, so that a pair of rounds that trains B and then A sees one rank. They rise while
    the budget does: what is added has no effect until it has learned, so modules take turns. A module that has become
    too deep ends its pair, and keeps its rank: what it has learned stays.
    """
    round_ = situation.round
    share = budget_share(situation.annealing, round_, situation.rounds)
    living = [name for name in situation.names if name not in situation.deep or situation.unfinished(name)]
    ranks = dict(situation.ranks)
    if round_ % 2 == 0 and situation.energies:
        energies = {name: situation.energies[name] for name in living}
        if situation.annealing.heating_rounds and round_ <= hottest(situation.annealing):
            most = situation.full_rank or situation.manifest.r_max
            energies = {name: (*found, *[0.0] * (most - len(found))) for name, found in energies.items()}
        fitting = fit_ranks(energies, situation.component_sizes, share * situation.full_parameters)
        ranks.update(fitting)
    modules = tuple(
        ModulePlan(name, ranks[name], situation.factor(name) if name in living else "") for name in situation.names
    )
    return Choice(modules, head_alive=situation.trains_head, mu=situation.initiating_mu)


def fit_ranks(energies: Mapping[str, tuple[float, ...]], sizes: Mapping[str, int], parameters: float) -> dict[str, int]:
    """Ranks that keep the most energy in a number of parameters; one component of every module is always kept.

    Args:
        energies: Singular values of every module's change, falling.
        sizes: Parameters of one component of every module.
        parameters: How many there may be.

    Returns:
        The rank of every module. Where energies are equal, as all are before anything has moved, modules take turns.
    """
    ranks = dict.fromkeys(energies, 1)
    left = parameters - sum(sizes[name] for name in ranks)
    offers = [
        (-(value**2) / sizes[name], place, number, name)
        for number, (name, values) in enumerate(energies.items())
        for place, value in enumerate(values)
        if place > 0
    ]
    closed: set[str] = set()
    for _, _, _, name in sorted(offers):
        if name in closed or sizes[name] > left:
            closed.add(name)  # a later component of the same module has less energy than this one
            continue
        ranks[name] += 1
        left -= sizes[name]
    return ranks
