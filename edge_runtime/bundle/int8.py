"""The int8 form of a frozen weight, for products in int8."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_runtime.bundle.errors import TensorFileError
from edge_runtime.bundle.tensors import Array

SCALE_SUFFIX = ":scale"  # of a quantised weight's scale in the file of weights


def int8_products(name: str, tensors: Mapping[str, Array], *, narrow: bool = False) -> dict[str, Array]:
    """What a fast graph reads for one weight: ``q`` int8 (out, in), ``qt`` its transpose, ``qs`` float32 (out,).

    weight = qs · q, one scale a row. A weight stored as int8 is taken as it is; only its transpose is a copy.

    Args:
        name: Of the weight.
        tensors: A bundle's weights by name.
        narrow: Use 7 of the 8 bits, -63 to 63, for processors whose products would saturate; q is always a copy then.

    Raises:
        TensorFileError: the weight is stored in four bits, or missing.
    """
    weight = tensors.get(name)
    if weight is None or weight.ndim != 2 or weight.dtype not in (np.int8, np.float16, np.float32):
        found = "nothing" if weight is None else f"{weight.dtype} {weight.shape}"
        raise TensorFileError(f"{name}: for int8 products: expected a matrix of int8, float16 or float32, got {found}")
    if weight.dtype == np.int8:
        rows, scale = weight, tensors[name + SCALE_SUFFIX]
    else:
        rows, scale = int8_rows(weight)
    if narrow:
        rows, scale = np.rint(rows * np.float32(63 / 127)).astype(np.int8), scale * np.float32(127 / 63)
    return {"q": rows, "qt": np.ascontiguousarray(rows.T), "qs": scale}


def int8_rows(weight: Array) -> tuple[Array, Array]:
    """A weight (out, in) in int8, from -127 to 127, and its scales (out,), float32: weight ≈ scale · rows."""
    values = weight.astype(np.float32, copy=False)
    scale = np.maximum(np.abs(values).max(axis=1) / np.float32(127), np.finfo(np.float32).tiny)
    return np.rint(values / scale[:, None]).astype(np.int8), scale
