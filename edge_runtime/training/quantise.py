"""A change rounded to few bits, and what is left of it for the next time: stochastic rounding with error feedback.

Rounding is unbiased: a value between two codes becomes the upper one with a chance equal to its distance from the lower
one, so that the mean over many devices loses nothing but noise. What a device did not send, because it was rounded or
beyond the range, is added to its change of the next round in which the tensor is alive (Seide et al. 2014; Karimireddy
et al., arXiv 1901.09847). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_runtime.bundle import Array
from edge_runtime.wire import Layout
from edge_runtime.wire.codes import largest_code

Flat = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Quantised:
    """A change as it is sent, and what stays.

    Attributes:
        values: Shape (layout.count,), float32; each is what a code stands for.
        residual: By tensor name, float32: of the alive tensors what was not sent, of the others what it was before.
    """

    values: Flat
    residual: dict[str, Array]


def quantise(change: Flat, layout: Layout, residual: Mapping[str, Array], *, rng: np.random.Generator) -> Quantised:
    """Round a change and what is left of earlier ones, block by block.

    A residual is kept within one range of zero: a tensor whose changes stay beyond its range would otherwise owe more
    every round, and pay it back when nobody wants it any more.

    Args:
        change: Of the alive tensors, shape (layout.count,), finite.
        layout: Their names, shapes and ranges.
        residual: What is left of earlier rounds, by tensor name, of the whole tensor's shape; absent where nothing is,
            unless only some components of the tensor are trained.
        rng: For the rounding. Devices must draw differently, else their errors do not cancel.

    Raises:
        ValueError: the layout does not quantise, or what is left of a tensor has another shape.
    """
    quantisation = layout.quantisation
    if quantisation is None:
        raise ValueError("quantise: the layout has no ranges: its updates are sent as float32")
    most = largest_code(quantisation.bits)
    values, kept = np.empty_like(change), dict(residual)
    blocks = zip(layout.split(change).items(), layout.split(values).values(), quantisation.steps, strict=True)
    for (name, part), out, step in blocks:
        left = np.array(residual.get(name, np.zeros_like(part)))
        where = layout.where(name)
        if left[where].shape != part.shape:  # numpy would spread a single column over all of them
            raise ValueError(f"residual of {name}: expected shape {part.shape}, got {left[where].shape}")
        wanted = part.astype(np.float64) + left[where]
        sent = (stochastic_codes(wanted / step, most, rng) * step).astype(np.float32)
        out[...] = sent
        left[where] = np.clip(wanted - sent, -most * step, most * step)
        kept[name] = left
    return Quantised(values, kept)


def stochastic_codes(scaled: Double, most: int, rng: np.random.Generator) -> Double:
    """Whole numbers within ±``most`` whose expectation is ``scaled``, where that is within them too."""
    clipped = np.clip(scaled, -most, most)
    low = np.floor(clipped)
    return low + (rng.random(clipped.shape) < clipped - low)
