"""What answers a measuring plan: sums over a device's examples of what enters the classifier.

Sums of several devices add up to those of their pooled examples, so class means and the spread around them follow
exactly, whoever holds which example. The blocks travel in an update frame like trained ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_runtime.wire.errors import UpdateValueError
from edge_runtime.wire.update import Layout, Update

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CLASS_SUMS = "class_sums"  # (classes, features): sum of h over the examples of each class
CLASS_COUNTS = "class_counts"  # (classes,): examples of each class
SECOND_MOMENTS = "second_moments"  # (features·(features + 1)/2,): upper triangle, by rows, of the sum of h·hᵀ


def measurement_layout(classes: int, features: int) -> Layout:
    """The blocks for a classifier of so many classes whose input h has so many features."""
    triangle = features * (features + 1) // 2
    return Layout(((CLASS_SUMS, (classes, features)), (CLASS_COUNTS, (classes,)), (SECOND_MOMENTS, (triangle,))))


def pack_triangle(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The upper triangle of a symmetric matrix (n, n) by rows, shape (n·(n + 1)/2,)."""
    import numpy as np

    return matrix[np.triu_indices(len(matrix))]


def unpack_triangle(values: npt.NDArray[np.float64], features: int) -> npt.NDArray[np.float64]:
    """The symmetric matrix (features, features) of such a triangle."""
    import numpy as np

    matrix = np.zeros((features, features))
    matrix[np.triu_indices(features)] = values
    return matrix + np.triu(matrix, 1).T


def check_measurement(update: Update, layout: Layout) -> None:
    """Demand whole counts from 0 that add up to the weight; the other sums may be any.

    Raises:
        UpdateValueError: they are not, so they count no examples.
    """
    import numpy as np

    counts = layout.split(update.values)[CLASS_COUNTS].astype(np.float64)
    if counts.min() < 0 or (counts != np.rint(counts)).any() or counts.sum() != update.weight:
        raise UpdateValueError(
            f"update: class counts: expected whole numbers from 0 that add up to the weight {update.weight}, "
            f"got {counts.min():g} to {counts.max():g}, together {counts.sum():g}"
        )
