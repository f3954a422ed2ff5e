"""A linear classifier from class means and the spread around them, in closed form (Fisher's linear discriminant).

Every class is taken for a Gaussian around its mean with one covariance for all, and as frequent as any other. The
covariance is estimated with the shrinkage of Chen, Wiesel, Eldar and Hero (OAS, arXiv 0907.4698), which needs nothing
but itself and the number of examples: with few examples it goes over to a multiple of the identity, and the classifier
to the nearest class mean. Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_runtime.bundle import Array

Double = npt.NDArray[np.float64]

_LEAD = 2.0  # in ln(classes): at its mean a class is as probable, beside each other one, as classes² to 1
_LEAST_SPREAD = 1e-6  # of the mean square: what is not measured, or lost to rounding, is no certainty


def linear_discriminant(sums: Double, counts: Double, moments: Double) -> tuple[Array, Array]:
    """Weight and bias of a classifier with logits ``weight · h + bias``.

    Real examples are less Gaussian than the model, so its logits are too sure. They are scaled down, never up, until a
    class leads by ``2·ln(classes)`` at its own mean on average.

    A class without examples has zero weights; its bias is the lowest logit of any other class at the mean of all
    examples, less ``ln(1 + examples)``.

    Args:
        sums: Sum of h over the examples of each class, shape (classes, features).
        counts: Examples of each class, shape (classes,); at least one in all.
        moments: Sum of h·hᵀ over all examples, shape (features, features).

    Returns:
        Weight (classes, features) and bias (classes,), float32.
    """
    seen = counts > 0
    total, classes = float(counts.sum()), int(seen.sum())
    means = sums[seen] / counts[seen, None]  # (seen, features)
    centre = sums[seen].sum(axis=0) / total
    offsets = means - centre
    between = (means.T * counts[seen]) @ means
    within = moments - between
    square = max(float(np.trace(moments)), float(np.trace(between))) / total  # sums may contradict each other
    floor = _LEAST_SPREAD * square + np.finfo(np.float64).tiny
    slopes = _solve(within, total - classes, floor, offsets)
    heights = np.sum(slopes * offsets, axis=1)  # (seen,); not negative
    lead = float(heights.mean())
    scale = min(1.0, _LEAD * float(np.log(classes)) / lead) if lead > 0 else 1.0
    slopes, heights = scale * slopes, scale * heights
    weight, bias = np.zeros(sums.shape), np.empty(len(sums))
    weight[seen] = slopes
    bias[seen] = -heights / 2 - slopes @ centre
    bias[~seen] = -heights.max() / 2 - np.log1p(total)
    return weight.astype(np.float32), bias.astype(np.float32)


def _solve(within: Double, freedom: float, floor: float, offsets: Double) -> Double:
    """``offsets · Σ⁻¹`` for the shrunk covariance Σ; shape (classes, features).

    Args:
        within: Scatter around the class means, shape (features, features).
        freedom: Examples less classes; 0 when every class has one, and nothing is known of the spread.
        floor: Least mean square distance from a class mean.
        offsets: Shape (classes, features).
    """
    features = len(within)
    values, axes = np.linalg.eigh(within / max(freedom, 1.0))
    values = np.clip(values, 0.0, None)  # rounding, or a device's sums that contradict each other
    trace, squares = float(values.sum()), float(np.sum(values**2))
    apart = (freedom + 1 - 2 / features) * (squares - trace**2 / features)
    shrinkage = min(1.0, ((1 - 2 / features) * squares + trace**2) / apart) if apart > 0 else 1.0
    shrunk = (1 - shrinkage) * values + shrinkage * max(trace, floor) / features
    return np.asarray((offsets @ axes / shrunk) @ axes.T)
