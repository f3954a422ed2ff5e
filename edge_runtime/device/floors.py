"""What no plan can make a device do, however well it is signed: its user's word against the aggregator's. Pure."""

from __future__ import annotations

from typing import Annotated

import msgspec

from edge_runtime.device.errors import FloorError
from edge_runtime.wire import Plan

_Most = Annotated[int, msgspec.Meta(gt=0, le=1 << 48)]


class Floors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of a device; the defaults are generous for the models of this project, and finite.

    Attributes:
        max_adapter_bytes: Of an adapter's file.
        max_bundle_bytes: Of all files of a bundle.
        max_modules: Of a plan.
        max_steps: Optimizer steps, or epochs, of one round.
        norm_bound: Whether a plan that trains must bound the norm of a change, so that what this device sends is
            clipped to it.
    """

    max_adapter_bytes: _Most = 1 << 30
    max_bundle_bytes: _Most = 16 << 30
    max_modules: _Most = 4_096
    max_steps: _Most = 1_000_000
    norm_bound: bool = False


def check_floors(plan: Plan, floors: Floors) -> None:
    """Demand that a plan keeps to this device's floors.

    Raises:
        FloorError: naming everything that does not.
    """
    amounts = {
        "adapter_bytes": (plan.adapter_bytes, floors.max_adapter_bytes),
        "modules": (len(plan.modules), floors.max_modules),
        "training.steps": (plan.training.steps or 0, floors.max_steps),
        "training.epochs": (plan.training.epochs or 0, floors.max_steps),
    }
    over = [f"{name}: expected at most {most}, got {asked}" for name, (asked, most) in amounts.items() if asked > most]
    if floors.norm_bound and plan.state == "train" and plan.update.max_norm is msgspec.UNSET:
        over.append("update.max_norm: expected a bound on the norm of a change, got none")
    if over:
        raise FloorError(f"plan of round {plan.round}: more than this device allows: " + "; ".join(over))
