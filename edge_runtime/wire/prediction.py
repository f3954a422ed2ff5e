"""Codes as differences from what an older adapter makes likely.

An adapter moves little in a few rounds. On the scales of the newer one most values of the older have the same code, so
differences are small, and Huffman's codes for them short. Both sides divide the same float32 in float64 and round to
nearest, ties to even: IEEE 754 leaves no choice, so they predict the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_runtime.wire.codes import Bits, largest_code
from edge_runtime.wire.components import lying

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_runtime.wire.codes import Codes

    Values = npt.NDArray[np.float32]


def predicted_codes(name: str, older: Values, scales: Values, bits: Bits) -> Codes:
    """The codes that come nearest to older values on newer scales.

    Args:
        name: Of the tensor; it says which way the components lie.
        older: Finite, shape of the newer values.
        scales: Of the newer ones, a float32 a component.
        bits: Of a code of this tensor.
    """
    import numpy as np

    most = largest_code(bits)
    steps = np.rint(np.divide(older, lying(name, scales), dtype=np.float64))
    return np.clip(steps, -most, most).astype(np.int8)


def code_differences(codes: Codes, predicted: Codes, bits: Bits) -> Codes:
    """What is to be added to predicted codes; around the circle of all codes, so that a difference is a code, too."""
    import numpy as np

    return _around(np.subtract(codes, predicted, dtype=np.int16), bits)


def add_differences(differences: Codes, predicted: Codes, bits: Bits) -> Codes:
    """The codes that :func:`code_differences` was given."""
    import numpy as np

    return _around(np.add(differences, predicted, dtype=np.int16), bits)


def _around(numbers: npt.NDArray[np.int16], bits: Bits) -> Codes:
    import numpy as np

    most = largest_code(bits)
    return ((numbers + most) % (2 * most + 1) - most).astype(np.int8)
