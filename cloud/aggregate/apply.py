"""Applying the mean of a round to the adapter the round started from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from edge_runtime.bundle import Array
from edge_runtime.wire import Layout


def largest_changes(before: Mapping[str, Array], after: Mapping[str, Array]) -> dict[str, float]:
    """The largest absolute change of every tensor that differs between two adapters of the same ranks."""
    changes = {name: float(np.max(np.abs(np.subtract(after[name], array)))) for name, array in before.items()}
    return {name: change for name, change in changes.items() if change > 0}


def apply_mean(adapter: Mapping[str, Array], layout: Layout, mean: npt.NDArray[np.float64]) -> dict[str, Array]:
    """The next adapter: alive blocks moved by the mean, everything else as it was.

    Args:
        adapter: The round's master adapter, float32 by tensor name.
        layout: The blocks that were trained.
        mean: Their mean change, shape (layout.count,), float64.

    Returns:
        A new table of float32 tensors. Each sum is made in float64 and rounded once.
    """
    moved = {
        name: np.add(adapter[name], change, dtype=np.float64).astype(np.float32)
        for name, change in layout.split(mean).items()
    }
    return {**adapter, **moved}
