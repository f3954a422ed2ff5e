"""How much each module still learns, from what the rounds moved. Pure.

A round's movement of a module is the Frobenius norm of the change of s·B·A that its mean update made, so it is known
from sums alone. It is compared with the mean of the modules that were alive in the same round, because movement falls
as a task converges, and by parameter, because that is what the budget counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edge_runtime.wire import ModulePlan, Training

_WEIGHT = 0.5  # of the newest round: a pair of rounds decides, older ones calm it
_DECAY = 0.9  # of a dead module's score, a round: what moved early must not win for ever


@dataclass(frozen=True)
class PastRound:
    """A round's modules as planned, and by how much each alive one moved.

    ``largest`` is the largest absolute mean change of every tensor that moved, ``training`` how devices trained.
    """

    modules: tuple[ModulePlan, ...]
    moved: Mapping[str, float]
    largest: Mapping[str, float] = field(default_factory=dict)
    training: Training | None = None


def scores(past: Sequence[PastRound], sizes: Mapping[str, int]) -> dict[str, float]:
    """Relative movement by parameter of every module that was ever alive, smoothed; 1 is the mean of the alive ones.

    Args:
        past: Every round so far, in order.
        sizes: Parameters of one component of every module.
    """
    found: dict[str, float] = {}
    for round_ in past:
        rates = {
            module.name: round_.moved[module.name] / (module.rank * sizes[module.name])
            for module in round_.modules
            if module.alive and module.name in round_.moved
        }
        mean = sum(rates.values()) / len(rates) if rates else 0.0
        for module in round_.modules:
            name = module.name
            if name in rates:
                relative = rates[name] / mean if mean else 1.0
                found[name] = relative if name not in found else found[name] + _WEIGHT * (relative - found[name])
            elif name in found:
                found[name] *= _DECAY
    return found
