"""Policies that choose what the next round trains: pure, by name, replayable from config, bundle and history."""

from cloud.planner.aggregation import AGGREGATIONS
from cloud.planner.anneal import anneal
from cloud.planner.annealing import Annealing, annealing_problems
from cloud.planner.choice import Choice, Policy, Situation
from cloud.planner.fixed import fixed

POLICIES: dict[str, Policy] = {"fixed": fixed, "anneal": anneal}


def choose(policy: str, situation: Situation) -> Choice:
    """What the policy of this name wants trained in the situation's round."""
    return POLICIES[policy](situation)


__all__ = [
    "AGGREGATIONS",
    "POLICIES",
    "Annealing",
    "Choice",
    "Policy",
    "Situation",
    "annealing_problems",
    "choose",
]
