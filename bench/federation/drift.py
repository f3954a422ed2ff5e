"""How far devices pull in different directions within one round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.bundle import Array


def drift(changes: Sequence[Array], weights: Sequence[int]) -> float:
    """Mean over devices of ‖Δ_k − Δ̄‖ / ‖Δ̄‖; 0 when nothing moved.

    Args:
        changes: Every device's change of the alive parameters, shape (count,).
        weights: Their weights in the mean Δ̄.
    """
    stacked = np.stack(changes).astype(np.float64)
    mean = np.average(stacked, axis=0, weights=weights)
    size = float(np.linalg.norm(mean))
    return float(np.mean(np.linalg.norm(stacked - mean, axis=1))) / size if size else 0.0
