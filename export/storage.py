"""Frozen weights in fewer bits, as a bundle stores them. Vectors stay float32.

| base | stored | scale ``{name}:scale`` |
|---|---|---|
| fp16 | float16 (out, in) | none |
| int8 | int8 (out, in), from -127 to 127 | float32 (out,), one a row |
| int4 | uint8 (out, in / 2): column j in the low four bits, column j + in / 2 in the high four, 8 being zero |
float16 (out, in / 32), one for 32 neighbouring columns, after the Q4_0 form of ggml |
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_runtime.bundle import SCALE_SUFFIX, Array, Base, int8_rows

GROUP = 32  # columns that share a scale in int4
_SMALLEST = 512  # elements: below that nothing is gained


def storage_of(shape: tuple[int, ...], base: Base) -> Base:
    """How a weight of this shape is stored in a bundle of this base.

    int4 needs rows of a multiple of 64, else the weight is int8.
    """
    if len(shape) != 2 or shape[0] * shape[1] < _SMALLEST:
        return "fp32"
    return "int8" if base == "int4" and shape[1] % (2 * GROUP) else base


def stored(name: str, values: Array, base: Base) -> dict[str, Array]:
    """The tensors that stand for one weight in a bundle.

    Args:
        name: Of the weight.
        values: float32.
        base: Of the bundle.
    """
    storage = storage_of(values.shape, base)
    if storage == "fp16":
        return {name: values.astype(np.float16)}
    if storage == "int8":
        rows, scale = int8_rows(values)
        return {name: rows, name + SCALE_SUFFIX: scale}
    if storage == "int4":
        return _int4(name, values)
    return {name: values}


def _int4(name: str, values: Array) -> dict[str, Array]:
    groups = values.reshape(len(values), -1, GROUP)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2)
    scale = (largest / np.float32(-8)).astype(np.float16)  # the largest value is met exactly, whatever its sign
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    levels = np.clip(np.rint(groups / divisor) + 8, 0, 15).astype(np.uint8).reshape(values.shape)
    half = values.shape[1] // 2
    return {name: levels[:, :half] | levels[:, half:] << 4, name + SCALE_SUFFIX: scale[:, :, 0]}


def restored(name: str, tensors: Mapping[str, Array]) -> Array:
    """The float32 weight that the tensors of :func:`stored` stand for."""
    values = tensors[name]
    if values.dtype == np.int8:
        return values.astype(np.float32) * tensors[name + SCALE_SUFFIX][:, None]
    if values.dtype == np.uint8:
        levels = np.concatenate([values & 15, values >> 4], axis=1).astype(np.float32) - 8
        scale = tensors[name + SCALE_SUFFIX].astype(np.float32)
        return (levels.reshape(*scale.shape, GROUP) * scale[:, :, None]).reshape(levels.shape)
    return values.astype(np.float32)
