"""How much each module, or each of its components, still learns, from what the rounds moved. Pure.

A round's movement of a module is the Frobenius norm of the change of s·B·A that its mean update made, so it is known
from sums alone. It is compared with the mean of those that were alive in the same round, because movement falls as a
task converges, and only with those that trained the same factor, because A and B move by different amounts. Modules
are compared by parameter, because that is what the budget counts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from edge_runtime.wire import ModulePlan, Training

_WEIGHT = 0.5  # of the newest round: a pair of rounds decides, older ones calm it
_DECAY = 0.9  # of the score of what is not trained, a round: what moved early must not win for ever

Unit = TypeVar("Unit", bound=Hashable)  # what is compared
Component = tuple[str, int]  # module and number


@dataclass(frozen=True)
class PastRound:
    """A round's modules as planned, and by how much each alive one, and each of its components, moved.

    ``largest`` is the largest absolute mean change of every tensor that moved, ``rms`` the root mean square of its
    mean changes, ``training`` how devices trained, and ``idle`` names the components that could not move because too
    few devices carried them: they say nothing.
    """

    modules: tuple[ModulePlan, ...]
    moved: Mapping[str, float]
    components: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    largest: Mapping[str, float] = field(default_factory=dict)
    training: Training | None = None
    idle: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rms: Mapping[str, float] = field(default_factory=dict)

    def carried(self, module: ModulePlan) -> tuple[int, ...]:
        """The components of one of the round's modules that it trained; none of a dead one."""
        idle = self.idle.get(module.name, ())
        return tuple(number for number in module.trained_components if number not in idle) if module.alive else ()


def scores(past: Sequence[PastRound], sizes: Mapping[str, int]) -> dict[str, float]:
    """Relative movement by parameter of every module that was ever alive, smoothed; 1 is the mean of the alive ones.

    Args:
        past: Every round so far, in order.
        sizes: Parameters of one component of every module.
    """
    return _smoothed(
        {
            module.name: (module.alive, round_.moved[module.name] / (len(carried) * sizes[module.name]))
            for module in round_.modules
            if (carried := round_.carried(module)) and module.name in round_.moved
        }
        for round_ in past
    )


def component_scores(past: Sequence[PastRound], ranks: Mapping[str, int]) -> dict[Component, float]:
    """Relative movement of every component that was ever trained, smoothed; 1 is the mean of the trained ones.

    Args:
        past: Every round so far, in order.
        ranks: Of the modules now. A round in which a module had another rank had other components, and is left out.
    """
    return _smoothed(
        {
            (module.name, number): (module.alive, round_.components[module.name][number])
            for module in round_.modules
            if module.alive and module.name in round_.components and module.rank == ranks[module.name]
            for number in round_.carried(module)
        }
        for round_ in past
    )


def _smoothed(rounds: Iterable[Mapping[Unit, tuple[str, float]]]) -> dict[Unit, float]:
    """Smooth what each trained unit moved relative to the others; what is not trained keeps its score, and fades.

    Where modules were born in different rounds, some train A while others train B. A round's mean for a factor is then
    taken over what its alive units moved when they trained that factor last, in this round or the one before.

    Args:
        rounds: The factor and the movement of every unit that was trained in each of them.
    """
    found: dict[Unit, float] = {}
    before: Mapping[Unit, tuple[str, float]] = {}
    for now in rounds:
        latest = {(unit, factor): rate for unit, (factor, rate) in before.items() if unit in now}
        latest.update({(unit, factor): rate for unit, (factor, rate) in now.items()})
        means = {
            factor: _mean([rate for (_, other), rate in latest.items() if other == factor])
            for factor in {factor for factor, _ in now.values()}
        }
        for unit in found.keys() - now.keys():
            found[unit] *= _DECAY
        for unit, (factor, rate) in now.items():
            relative = rate / means[factor] if means[factor] else 1.0
            found[unit] = relative if unit not in found else found[unit] + _WEIGHT * (relative - found[unit])
        before = now
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
