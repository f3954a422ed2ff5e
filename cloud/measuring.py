"""The round before training in which devices measure what the classifier's head is made from (``head_init``).

It is round 0 and its plan says ``measure``. The rounds that train follow it, and everything that depends on how far
training has come (policies, which factor is trained, learning rates) counts them from 0 as if it had not been.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cloud.aggregate import linear_discriminant
from cloud.config import Config
from edge_runtime import wire
from edge_runtime.bundle import Array, Manifest


def measuring_rounds(config: Config) -> int:
    """How many rounds come before training."""
    return 1 if config.task.head_init == "class-means" else 0


def measures(config: Config, round_: int) -> bool:
    """Whether a round of the task measures instead of training."""
    return round_ < measuring_rounds(config)


def training_round(config: Config, round_: int) -> int:
    """Which round of training it is, from 0; negative for one that measures."""
    return round_ - measuring_rounds(config)


def measuring_devices(config: Config) -> int:
    """How many updates close a round that measures."""
    return config.task.head_init_devices or config.task.devices_per_round


def measuring_rules(config: Config) -> wire.UpdateRules:
    """Bounds that keep the sums exact: sums over examples are larger than changes of parameters, and weigh 1.

    A count below 2**24 is exact in a float32, and (2**24 · 2**24 + 1) · 16,384 devices fit 63 bits.
    """
    return wire.UpdateRules(fraction_bits=24, max_abs=2.0**24, weight_cap=1, max_devices=measuring_devices(config))


def measuring_problems(config: Config, manifest: Manifest) -> list[str]:
    """Why this bundle's head cannot be made from class means, if it cannot."""
    if not measuring_rounds(config):
        return []
    asked = "task.head_init is class-means, which needs"
    if manifest.task != "classify" or manifest.head.linear is None:
        return [f"{asked} a linear classifier: the bundle's task is {manifest.task}"]
    if manifest.engine != "blocks":
        return [f"{asked} a bundle of blocks: the bundle's engine is {manifest.engine}"]
    return []


def measuring_layout(manifest: Manifest) -> wire.Layout:
    """The layout of updates to a plan that measures.

    Raises:
        PlanFormatError: the bundle has no classifier to measure for.
    """
    if manifest.head.linear is None:
        raise wire.PlanFormatError("plan: measures class means: the bundle has no linear classifier")
    return wire.measurement_layout(*manifest.head.linear)


def with_class_means(
    manifest: Manifest, adapter: dict[str, Array], layout: wire.Layout, sums: npt.NDArray[np.float64]
) -> dict[str, Array]:
    """The adapter with a head made from what all devices measured together, shape (layout.count,)."""
    parts = layout.split(sums)
    class_sums = parts[wire.CLASS_SUMS].astype(np.float64)
    moments = wire.unpack_triangle(parts[wire.SECOND_MOMENTS].astype(np.float64), class_sums.shape[1])
    weight, bias = linear_discriminant(class_sums, parts[wire.CLASS_COUNTS].astype(np.float64), moments)
    return {**adapter, f"{manifest.head.module}.weight": weight, f"{manifest.head.module}.bias": bias}
