"""The plan's bound on the norm of a whole change, kept by the device: one that is larger is scaled down. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_runtime.wire import UpdateValueError, norm_of

Flat = npt.NDArray[np.float32]

# Below the bound by so much, in parts of it: values are rounded to float32, and other machines add up in other orders.
_MARGIN = 1e-6


@dataclass(frozen=True)
class Clipped:
    """A change within its bound, shape (count,), and the L2 norm that it had before."""

    values: Flat
    norm: float


def clip_update(change: Flat, *, max_norm: float) -> Clipped:
    """Scale a change so that its L2 norm is at most ``max_norm``.

    Args:
        change: Shape (count,), float32.
        max_norm: Bound on the norm of the whole change; more than 0.

    Returns:
        The scaled change; one that is within the bound as it is.

    Raises:
        UpdateValueError: the change holds NaN or infinity.
    """
    norm = norm_of(change)
    if not math.isfinite(norm):
        raise UpdateValueError(f"update: values: expected finite, got a change of norm {norm}")
    if norm <= max_norm:
        return Clipped(change, norm)
    return Clipped((change * np.float64(shrink(norm, max_norm))).astype(np.float32), norm)


def shrink(norm: float, max_norm: float) -> float:
    """What a change of this norm is multiplied with to be within ``max_norm``; 1 for one that is."""
    return 1.0 if norm <= max_norm else max_norm / norm * (1 - _MARGIN)
