"""Policy ``fixed``: every module alive at the rank it has, in every round. The one others are compared with."""

from __future__ import annotations

from cloud.planner.aggregation import AGGREGATIONS
from cloud.planner.choice import Choice, Situation
from edge_runtime.wire import ModulePlan


def fixed(situation: Situation) -> Choice:
    """All modules, the factor of the round, and the head if the bundle trains one."""
    factor = AGGREGATIONS[situation.aggregation](situation.round)
    modules = tuple(
        ModulePlan(name=name, rank=situation.ranks[name], alive=factor) for name in situation.manifest.module_names
    )
    return Choice(modules=modules, head_alive=situation.manifest.head.module is not None)
