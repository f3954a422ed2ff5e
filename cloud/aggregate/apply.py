"""Applying the mean of a round to the adapter the round started from."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edge_runtime.bundle import Array
from edge_runtime.wire import Layout

Double = npt.NDArray[np.float64]


def largest_changes(before: Mapping[str, Array], after: Mapping[str, Array]) -> dict[str, float]:
    """The largest absolute change of every tensor that differs between two adapters of the same ranks."""
    changes = {name: float(np.max(np.abs(np.subtract(after[name], array)))) for name, array in before.items()}
    return {name: change for name, change in changes.items() if change > 0}


def rms_changes(before: Mapping[str, Array], after: Mapping[str, Array]) -> dict[str, float]:
    """The root mean square of the change of every tensor that differs between two adapters of the same ranks."""
    changes = {name: np.subtract(after[name], array, dtype=np.float64) for name, array in before.items()}
    return {name: math.sqrt(float(np.mean(change**2))) for name, change in changes.items() if change.any()}


def apply_mean(adapter: Mapping[str, Array], layout: Layout, mean: npt.NDArray[np.float64]) -> dict[str, Array]:
    """The next adapter: alive blocks moved by the mean, everything else as it was.

    Args:
        adapter: The round's master adapter, float32 by tensor name.
        layout: The blocks that were trained.
        mean: Their mean change, shape (layout.count,), float64.

    Returns:
        A new table of float32 tensors. Each sum is made in float64 and rounded once.
    """
    changes = layout.split(mean)
    return {
        **adapter,
        **{name: moved(adapter, layout, name, change).astype(np.float32) for name, change in changes.items()},
    }


def moved(adapter: Mapping[str, Array], layout: Layout, name: str, change: npt.NDArray[np.generic]) -> Double:
    """A tensor of the adapter with a change of its trained part, which has the block's shape; float64."""
    tensor = adapter[name].astype(np.float64)
    tensor[layout.where(name)] += change
    return tensor
