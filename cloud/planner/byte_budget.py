"""From a budget in bytes to the shares that policies read. Pure.

Policies keep to a number of parameters, and which modules these belong to is known only round by round. So a round is
planned at the most that any choice of so many parameters can cost, the dearest per parameter first; no choice costs
more. The settings' shares are multiplied by the largest factor with which the planned bytes of all training rounds are
within the budget. What a policy takes whatever its share is planned, too: everything in the first cycle of the
policies that kill, one module in their later rounds, a component of every module in ``anneal``, one in ``lora-a2``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from cloud.planner.aggregation import AGGREGATIONS
from cloud.planner.annealing import Annealing, budget_share, known_from, lowest_block
from cloud.planner.costs import Component, Traffic, fixed_bytes
from cloud.planner.lora_a2 import components_of

_HALVINGS = 50  # of the interval in which the factor is sought: finer than a parameter, and the same everywhere
_SLACK = 1 + 1e-9  # a share of 1 must not be missed by a rounding error


@dataclass(frozen=True)
class Affordable:
    """Settings whose planned bytes are within a budget, and the share of the last round."""

    settings: Annealing
    last_share: float


def afford(settings: Annealing, policy: str, traffic: Traffic, *, rounds: int, allowed: int) -> Affordable | None:
    """Scale the shares of the settings to a budget.

    Args:
        settings: Whose ``budget_start`` and ``budget_end`` give the shape.
        policy: That reads them.
        traffic: What is sent how.
        rounds: That train.
        allowed: Bytes of one device in all of them together.

    Returns:
        The settings with the largest shares that fit; None where not even the least plans do.
    """

    def fits(scale: float) -> bool:
        return sum(planned_bytes(_scaled(settings, scale), policy, traffic, rounds)) <= allowed

    low, high = 0.0, _SLACK / settings.budget_end  # from nothing to all of the adapter in every round
    if not fits(low):
        return None
    if fits(high):
        low = high
    else:
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    found = _scaled(settings, low)
    cycle = len(AGGREGATIONS[traffic.aggregation])
    return Affordable(found, planned_share(found, policy, rounds - 1, rounds=rounds, cycle=cycle))


def least_bytes(settings: Annealing, policy: str, traffic: Traffic, rounds: int) -> int:
    """What the training rounds may cost one device together when shares are as small as can be."""
    return sum(planned_bytes(_scaled(settings, 0.0), policy, traffic, rounds))


def planned_share(settings: Annealing, policy: str, round_: int, *, rounds: int, cycle: int) -> float:
    """The share that a policy takes from the settings in a round."""
    if policy == "lora-a2":
        return min(1.0, settings.budget_end)
    if policy == "anneal":
        return budget_share(settings, round_ - round_ % 2, rounds)  # ranks change in even rounds only
    if round_ < known_from(settings, cycle):
        return 1.0
    return min(1.0, settings.budget_end) if policy == "kill-revive" else budget_share(settings, round_, rounds)


def planned_bytes(settings: Annealing, policy: str, traffic: Traffic, rounds: int) -> list[int]:
    """The most that each training round may cost a device under these settings."""
    fixed = fixed_bytes(traffic, lists_components=policy == "lora-a2")
    cycle = len(AGGREGATIONS[traffic.aggregation])
    wanted = [
        (
            planned_share(settings, policy, round_, rounds=rounds, cycle=cycle),
            _lowest_living(settings, policy, traffic, round_ - cycle + 1, rounds),
        )
        for round_ in range(rounds)
    ]
    most = {each: _most(policy, traffic, *each) for each in set(wanted)}  # many rounds have the same
    return [fixed + most[each] for each in wanted]


def _lowest_living(settings: Annealing, policy: str, traffic: Traffic, begun: int, rounds: int) -> int:
    """The lowest block with modules that may live when their cycle began in a round."""
    if policy == "lora-a2":
        return 0
    return lowest_block(settings, traffic.manifest.module_blocks, max(begun, 0), rounds)


def _most(policy: str, traffic: Traffic, share: float, lowest: int) -> int:
    """The most bytes that what a policy chooses with a share, from a block up, can have."""
    parts = traffic.components_from(lowest)
    if policy == "lora-a2":
        return components_of(share, traffic.rank * len(parts)) * max(part.bytes for part in parts)
    least = sum(part.bytes for part in parts) if policy == "anneal" else traffic.rank * max(p.bytes for p in parts)
    return max(_dearest(traffic, share, parts), least)


def _dearest(traffic: Traffic, share: float, parts: Sequence[Component]) -> int:
    """The most bytes that a share of all parameters can have: those of the modules that are dearest per parameter."""
    left = share * traffic.rank * sum(part.parameters for part in traffic.components)
    found = 0.0
    for part in sorted(parts, key=lambda part: -part.bytes / part.parameters):
        taken = min(left, traffic.rank * part.parameters)
        found += taken * part.bytes / part.parameters
        left -= taken
    return math.ceil(found)


def _scaled(settings: Annealing, scale: float) -> Annealing:
    return msgspec.structs.replace(
        settings,
        budget_start=scale * settings.budget_start,
        budget_end=scale * settings.budget_end,
        bytes_per_device_per_round=None,
        total_bytes=None,
    )
