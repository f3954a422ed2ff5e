"""From the config's ``task.upload`` to what a plan says about quantised updates."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cloud.config import UPLOAD_BITS, Config
from cloud.planner import PastRound, ternary_ranges, update_ranges
from cloud.planning import plan_layout
from edge_runtime import wire
from edge_runtime.bundle import Bundle


def with_quantisation(config: Config, bundle: Bundle, plan: wire.Plan, past: Sequence[PastRound]) -> wire.Plan:
    """The plan with the ranges of its updates, made anew; without any where they are sent as float32.

    A plan that measures is answered with float32: its sums are no changes, and decide the head for good.

    Args:
        config: Says how updates are sent.
        bundle: The task's.
        plan: Names what is alive and how it is trained; what it says of quantisation is replaced.
        past: Every round applied before it.
    """
    plain = msgspec.structs.replace(plan, quantisation=msgspec.UNSET)
    task, bits = config.task, UPLOAD_BITS[config.task.upload]
    if plan.state != "train" or bits == 32:
        return plain
    names, most = [name for name, _ in plan_layout(bundle, plain).blocks], plan.update.max_abs
    if bits == 2:
        ranges = ternary_ranges(names, plan.training, past, max_abs=most, devices=task.devices_per_round)
    else:
        ranges = update_ranges(names, plan.training, past, max_abs=most)
    quantisation = wire.Quantisation.of(bits, ranges, task.upload_density)
    return msgspec.structs.replace(plain, quantisation=quantisation)
