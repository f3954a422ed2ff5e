"""Policies that choose what the next round trains: pure, by name, replayable from config, bundle and history."""

from cloud.planner.aggregation import AGGREGATIONS
from cloud.planner.anneal import anneal
from cloud.planner.annealed_kill_revive import annealed_kill_revive
from cloud.planner.annealing import Annealing, annealing_problems, bytes_problems
from cloud.planner.byte_budget import afford
from cloud.planner.choice import Choice, Policy, Situation
from cloud.planner.costs import Traffic
from cloud.planner.fixed import fixed
from cloud.planner.kill_revive import kill_revive
from cloud.planner.lora_a2 import lora_a2
from cloud.planner.ranges import ternary_ranges, update_ranges
from cloud.planner.scores import PastRound
from cloud.planner.tiers import Tiers, plan_tiers, tiers_problems

POLICIES: dict[str, Policy] = {
    "fixed": fixed,
    "anneal": anneal,
    "kill-revive": kill_revive,
    "annealed-kill-revive": annealed_kill_revive,
    "lora-a2": lora_a2,
}


def choose(policy: str, situation: Situation) -> Choice:
    """What the policy of this name wants trained in the situation's round."""
    return POLICIES[policy](situation)


__all__ = [
    "AGGREGATIONS",
    "POLICIES",
    "Annealing",
    "Choice",
    "PastRound",
    "Policy",
    "Situation",
    "Tiers",
    "Traffic",
    "afford",
    "annealing_problems",
    "bytes_problems",
    "choose",
    "plan_tiers",
    "ternary_ranges",
    "tiers_problems",
    "update_ranges",
]
