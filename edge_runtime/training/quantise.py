"""A change rounded to few bits, and what is left of it for the next time: rounding with error feedback.

Rounding to eight or four bits is unbiased: a value between two codes becomes the upper one with a chance equal to its
distance from the lower one, so that the mean over many devices loses nothing but noise. Ternary codes are the nearest
ones: where two steps are all there is, rounding at random adds more than the change itself has. What a device did not
send, because it was rounded or beyond the range, is added to its change of the next round in which the tensor is alive
(Seide et al. 2014; Karimireddy et al., arXiv 1901.09847). Pure.

Where the plan has a density, only the largest of all values are sent, whatever block they are in, and the others wait
in the same way (Aji and Heafield, arXiv 1704.05021; of LoRA factors, FLASC, arXiv 2406.05233).

Where the plan bounds the norm of a whole change, what is beyond it is lost, as without rounding: that bound is there so
that no device moves the model by more. Rounding may enlarge a change; one that is beyond the bound then is made smaller
before it is rounded anew, and what that leaves out is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from edge_runtime.bundle import Array
from edge_runtime.training.clipping import shrink
from edge_runtime.wire import Layout, norm_of
from edge_runtime.wire.codes import largest_code

Flat = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]

# What a device may owe of a value, in ranges. Eight and four bits have ranges beyond nearly every change; the range of
# ternary codes is hardly more than a usual change, and large ones are sent in several rounds.
_MOST_OWED = {8: 1, 4: 1, 2: 8}
_TRIES = 8  # of rounding to a bound; after them it is rounded towards zero, which enlarges nothing


@dataclass(frozen=True)
class Quantised:
    """A change as it is sent, and what stays.

    Attributes:
        values: Shape (layout.count,), float32; each is what a code stands for.
        residual: By tensor name, float32: of the alive tensors what was not sent, of the others what it was before.
    """

    values: Flat
    residual: dict[str, Array]


def quantise(
    change: Flat,
    layout: Layout,
    residual: Mapping[str, Array],
    *,
    rng: np.random.Generator,
    max_norm: float = math.inf,
) -> Quantised:
    """Round a change and what is left of earlier ones, block by block.

    A residual is kept within one range of zero, of ternary codes eight: a tensor whose changes stay beyond its range
    would otherwise owe more every round, and pay it back when nobody wants it any more.

    Args:
        change: Of the alive tensors, shape (layout.count,), finite.
        layout: Their names, shapes and ranges.
        residual: What is left of earlier rounds, by tensor name, of the whole tensor's shape; absent where nothing is,
            unless only some components of the tensor are trained.
        rng: For the rounding at random. Devices must draw differently, else their errors do not cancel.
        max_norm: The L2 norm of what is sent is at most this.

    Raises:
        ValueError: the layout does not quantise, or what is left of a tensor has another shape.
    """
    quantisation = layout.quantisation
    if quantisation is None:
        raise ValueError("quantise: the layout has no ranges: its updates are sent as float32")
    most = _MOST_OWED[quantisation.bits] * largest_code(quantisation.bits)
    wanted, kept = change.astype(np.float64), dict(residual)
    for name, part in layout.split(wanted).items():
        kept[name] = np.array(residual.get(name, np.zeros(part.shape, np.float32)))
        left = kept[name][layout.where(name)]
        if left.shape != part.shape:  # numpy would spread a single column over all of them
            raise ValueError(f"residual of {name}: expected shape {part.shape}, got {left.shape}")
        part[...] = np.add(part, left)
    wanted *= shrink(float(np.linalg.norm(wanted)), max_norm)
    values = _within(_largest(wanted, quantisation.held(layout.count)), layout, rng, max_norm)
    blocks = zip(layout.split(wanted - values).items(), quantisation.steps, strict=True)
    for (name, owed), step in blocks:
        kept[name][layout.where(name)] = np.clip(owed, -most * step, most * step)
    return Quantised(values, kept)


def _largest(wanted: Double, count: int) -> Double:
    """The ``count`` values that are largest in size, and 0 in place of the others, shape (n,).

    Of equal ones at the border those that come first are taken.
    """
    if count >= wanted.size:
        return wanted
    sizes = np.abs(wanted)
    border = np.partition(sizes, wanted.size - count)[wanted.size - count]
    taken = sizes > border
    level = np.flatnonzero(sizes == border)
    taken[level[: count - int(np.count_nonzero(taken))]] = True
    return np.where(taken, wanted, 0.0)


def _within(wanted: Double, layout: Layout, rng: np.random.Generator, max_norm: float) -> Flat:
    """A change rounded so that its norm is within the bound, within which it is itself; shape (count,)."""
    assert layout.quantisation is not None, "the caller has looked"
    to_codes = nearest_codes if layout.quantisation.bits == 2 else partial(stochastic_codes, rng=rng)
    share = 1.0
    for _ in range(_TRIES):
        values = _rounded(share * wanted, layout, to_codes)
        norm = norm_of(values)
        if norm <= max_norm:
            return values
        share *= shrink(norm, max_norm)
    return _rounded(wanted, layout, lambda scaled, most: np.trunc(np.clip(scaled, -most, most)))


def _rounded(wanted: Double, layout: Layout, to_codes: Callable[[Double, int], Double]) -> Flat:
    """What codes stand for, shape (count,)."""
    values: Flat = np.empty(wanted.shape, np.float32)
    quantisation = layout.quantisation
    assert quantisation is not None, "the caller has looked"
    most = largest_code(quantisation.bits)
    blocks = zip(layout.split(wanted).values(), layout.split(values).values(), quantisation.steps, strict=True)
    for part, out, step in blocks:
        out[...] = to_codes(np.divide(part, step), most) * step
    return values


def nearest_codes(scaled: Double, most: int) -> Double:
    """The whole numbers within ±``most`` that are nearest."""
    return np.rint(np.clip(scaled, -most, most))


def stochastic_codes(scaled: Double, most: int, rng: np.random.Generator) -> Double:
    """Whole numbers within ±``most`` whose expectation is ``scaled``, where that is within them too."""
    clipped = np.clip(scaled, -most, most)
    low = np.floor(clipped)
    return low + (rng.random(clipped.shape) < clipped - low)
