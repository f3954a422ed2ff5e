"""The annealing schedule: how far a task has cooled, and what may be trained then. Pure functions of the round.

After SA-FedLoRA (arXiv 2405.09394): initiating rounds at the full budget, rounds of heating if there are any, then a
budget that falls to its end, and final rounds that stay there. The curve is ours to choose; ``cubic`` is AdaLoRA's
(arXiv 2303.10512).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from cloud.planner.depth import lowest_of

# From how far the task has cooled, 0 to 1, to what is left of the way from the start's budget to the end's.
CURVES: dict[str, Callable[[float], float]] = {
    "cubic": lambda x: (1 - x) ** 3,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "linear": lambda x: 1 - x,
}


class Annealing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The operator's settings; budgets are shares of the adapter at the task's rank.

    Where a budget in bytes is given, ``budget_start`` and ``budget_end`` only say how rounds compare with one another:
    both are scaled so that the mean of what the training rounds may cost a device, up and down, is at most the budget.
    See :mod:`cloud.planner.byte_budget`.
    """

    budget_start: float = 1.0  # of the parameters at the task's rank; the first rounds find out what matters
    budget_end: float = 0.25  # a quarter of the rank serves most modules as well
    curve: str = "cubic"  # falls early: most of the bytes are sent while the budget is large
    initiating_rounds: int = 2  # one of each factor at the full budget
    heating_rounds: int = 0  # after them: the budget climbs from its end to its start before it falls
    final_rounds: int = 2  # what is left settles
    initiating_mu: float = 0.0  # FedProx pull in the initiating rounds, against client drift; 0: training.mu
    temperature_start: float = 0.5  # a dead module half the mean weaker than a living one wins with exp(-1)
    temperature_end: float = 0.02  # nearly none comes back unless it is stronger
    depth_start: float = 1.0  # share of the blocks, from the last one down, in which anything may be trained
    depth_end: float = 1.0  # a device computes no backward pass below them, and remembers what they make of its data
    bytes_per_device_per_round: int | None = None  # the mean over the training rounds; None: shares are what they say
    total_bytes: int | None = None  # the same for devices_per_round devices and all training rounds together


def hottest(settings: Annealing) -> int:
    """The round from which a task cools, and in which it is heated through."""
    return settings.initiating_rounds + settings.heating_rounds


def cooled(settings: Annealing, round_: int, rounds: int) -> float:
    """How far the task has cooled in a round, from 0 to 1."""
    begun = hottest(settings)
    span = rounds - settings.final_rounds - begun
    if span <= 0:
        return 0.0 if round_ < begun else 1.0
    return min(max((round_ - begun) / span, 0.0), 1.0)


def budget_share(settings: Annealing, round_: int, rounds: int) -> float:
    """Share of the adapter at the task's rank that may be alive in a round; at most 1, whatever bytes allow."""
    left = CURVES[settings.curve](cooled(settings, round_, rounds))
    heated = (round_ - settings.initiating_rounds + 1) / (settings.heating_rounds + 1)  # 1 in the first round after
    if 0 < heated < 1:
        left = heated
    return min(1.0, settings.budget_end + (settings.budget_start - settings.budget_end) * left)


def lowest_block(settings: Annealing, blocks: Sequence[int], round_: int, rounds: int) -> int:
    """The first of the blocks that have modules in which anything may be trained in a round. It never falls.

    Kills from the bottom up save compute: see ``docs/adr/0017-depth-falls-with-the-budget.md``.
    """
    left = CURVES[settings.curve](cooled(settings, round_, rounds))
    depth = settings.depth_end + (settings.depth_start - settings.depth_end) * left
    return lowest_of(depth, blocks)


def known_from(settings: Annealing, cycle: int) -> int:
    """The first round for which every module has trained each of its factors equally often, in ``cycle`` rounds."""
    return cycle * max(1, math.ceil(settings.initiating_rounds / cycle))  # nothing is known before the first cycle


def temperature(settings: Annealing, round_: int, rounds: int) -> float:
    """The temperature of a round, falling geometrically from start to end."""
    ratio = settings.temperature_end / settings.temperature_start
    return settings.temperature_start * math.pow(ratio, cooled(settings, round_, rounds))


def annealing_problems(settings: Annealing, rounds: int) -> list[str]:
    """Every way in which the settings are wrong."""
    stages = settings.initiating_rounds, settings.heating_rounds, settings.final_rounds
    rules = {
        f"annealing.curve: expected one of {', '.join(CURVES)}, got {settings.curve!r}": settings.curve not in CURVES,
        f"annealing.budget_start: expected more than 0 and at most 1, got {settings.budget_start}": not (
            0 < settings.budget_start <= 1
        ),
        f"annealing.budget_end ({settings.budget_end}) must be more than 0 and at most annealing.budget_start "
        f"({settings.budget_start})": not 0 < settings.budget_end <= settings.budget_start,
        f"annealing.initiating_rounds, heating_rounds and final_rounds: expected 0 or more and together at most "
        f"task.rounds ({rounds}), got {', '.join(map(str, stages))}": min(stages) < 0 or sum(stages) > rounds,
        f"annealing.temperature_end ({settings.temperature_end}) must be more than 0 and at most "
        f"annealing.temperature_start ({settings.temperature_start})": not (
            0 < settings.temperature_end <= settings.temperature_start < math.inf
        ),
        f"annealing.depth_start: expected more than 0 and at most 1, got {settings.depth_start}": not (
            0 < settings.depth_start <= 1
        ),
        f"annealing.depth_end ({settings.depth_end}) must be more than 0 and at most annealing.depth_start "
        f"({settings.depth_start})": not 0 < settings.depth_end <= settings.depth_start,
        f"annealing.initiating_mu: expected 0 or more, got {settings.initiating_mu}": not (
            math.isfinite(settings.initiating_mu) and settings.initiating_mu >= 0
        ),
    }
    return [message for message, broken in rules.items() if broken]


def bytes_problems(settings: Annealing, policy: str) -> list[str]:
    """Every way in which the budget in bytes is wrong, before the bundle is known."""
    amounts = {
        f"annealing.{name}": value
        for name in ("bytes_per_device_per_round", "total_bytes")
        if (value := getattr(settings, name)) is not None
    }
    problems = [f"{key}: expected at least 1, got {value}" for key, value in amounts.items() if value < 1]
    if len(amounts) > 1:
        problems.append(f"{' and '.join(amounts)}: give one of them, not both")
    if amounts and policy == "fixed":
        problems.append(f"{next(iter(amounts))} is for a policy with a budget, and task.policy is fixed")
    return problems
