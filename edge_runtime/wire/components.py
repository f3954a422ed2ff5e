"""Components of a matrix in few bits: rounded to nearest, a scale for each, and products that are exact.

A *component* is what cutting a rank takes or leaves: a row of ``lora_a`` (r, in), a column of ``lora_b`` (out, r); of
any other matrix, a row. What is no matrix stays float32. A matrix that is no factor, a head's, has 8 bits where factors
have 4: it is sent seldom and decides alone what a class is, while many factors make a layer.

A component's scale is the least power of two with which its largest absolute value is no more than the largest code,
and at least 2**-126. So code times scale is exact in float32: every machine restores the same bits, and what was
restored gives the same codes and scales again. And a scale stays when a component grows a little, so most of its codes
do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from edge_runtime.wire.codes import Bits, largest_code

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_runtime.wire.codes import Codes

    Values = npt.NDArray[np.float32]
    Value = TypeVar("Value", bound=np.generic)

SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: its products with codes are exact, and none divides by zero
_LARGEST = 2.0**127  # of what is greater, the nearest multiple of a scale may be infinite


def scale_count(name: str, shape: tuple[int, ...]) -> int:
    """How many components a tensor has; 0 for one that stays float32."""
    return shape[component_axis(name)] if len(shape) == 2 else 0


def is_factor(name: str) -> bool:
    """Whether a tensor is a LoRA factor, and none of a head's."""
    return name.endswith((".lora_a", ".lora_b"))


def component_axis(name: str) -> int:
    """Along which axis of a matrix its components lie side by side: 1 for the columns of B, else 0."""
    return 1 if name.endswith(".lora_b") else 0


def code_bits(name: str, bits: Bits) -> Bits:
    """Bits of a code of this tensor where those of a factor have ``bits``."""
    return bits if is_factor(name) else 8


def quantise(name: str, values: Values, bits: Bits) -> tuple[Codes, Values]:
    """Codes and scales of a matrix.

    Args:
        name: Of the tensor in its adapter; it says which way the components lie.
        values: A matrix, float32, finite; of what is beyond 2**127, its sign and that are kept.
        bits: Of a factor's code, see :func:`code_bits`.

    Returns:
        The codes, int8 in the matrix's shape, and a scale a component, float32. No value is off by more than half its
        component's scale.
    """
    import numpy as np

    axis = component_axis(name)
    values = np.clip(values, -_LARGEST, _LARGEST)
    largest = np.abs(values).max(axis=1 - axis, keepdims=True)
    least = np.divide(largest, largest_code(code_bits(name, bits)), dtype=np.float64)
    fraction, exponent = np.frexp(np.maximum(least, SMALLEST_SCALE))  # a fraction of 0.5: a power of two already
    scales = np.ldexp(1.0, exponent - (fraction == 0.5)).astype(np.float32)
    codes = np.rint(np.divide(values, scales, dtype=np.float64)).astype(np.int8)
    return codes, scales.ravel()


def lying(name: str, values: npt.NDArray[Value]) -> npt.NDArray[Value]:
    """A value a component of a matrix, shape (components,), in the shape that numpy spreads over the matrix."""
    return values[:, None] if component_axis(name) == 0 else values[None, :]


def restore(name: str, codes: Codes, scales: Values) -> Values:
    """The values that codes and scales stand for, float32."""
    import numpy as np

    return np.multiply(codes.astype(np.float32), lying(name, scales), dtype=np.float32)


def rounded(name: str, values: Values, bits: Bits) -> Values:
    """A tensor quantised and restored; one that stays float32 as it is."""
    return restore(name, *quantise(name, values, bits)) if scale_count(name, values.shape) else values
