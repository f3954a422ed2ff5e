"""Policy ``fixed``: every module alive at the rank it has, in every round. The one others are compared with."""

from __future__ import annotations

from cloud.planner.choice import Choice, Situation
from edge_runtime.wire import ModulePlan


def fixed(situation: Situation) -> Choice:
    """All modules, each with the factor whose turn it is, and the head if the bundle trains one."""
    modules = tuple(ModulePlan(name, situation.ranks[name], situation.factor(name)) for name in situation.names)
    return Choice(modules, head_alive=situation.trains_head)
