"""Updates in few bits: what a plan says about them, and values as packed codes.

Every block of an update has one range, named by the plan and the same for every device, so that the codes of several
devices could be added before anybody turns them into values. A code c of a block stands for ``c · range / most``, most
being 127 or 7. How a device rounds a change to such values is its own affair: :mod:`edge_runtime.training.quantise`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from edge_runtime.wire.codes import Bits, largest_code, pack_codes, packed_bytes, unpack_codes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float32]


class Quantisation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bits of a code, and for every block of the layout, in its order, the largest absolute change a code can say."""

    bits: Bits
    ranges: tuple[float, ...]

    @property
    def steps(self) -> tuple[float, ...]:
        """What one code of each block stands for."""
        return tuple(range_ / largest_code(self.bits) for range_ in self.ranges)


def payload_bytes(sizes: Sequence[int], bits: Bits) -> int:
    """Length of the packed codes of blocks of these numbers of values; each block starts at a byte."""
    return sum(packed_bytes(size, bits) for size in sizes)


def encode_codes(values: Values, sizes: Sequence[int], quantisation: Quantisation) -> bytes:
    """Values as packed codes, block after block.

    Args:
        values: Flat, shape (sum of sizes,), float32; each the very value that its code stands for.
        sizes: Number of values of every block.
        quantisation: One range a block.

    Raises:
        ValueError: (for the caller to name) a value that no code stands for. Nothing is rounded here.
    """
    import numpy as np

    parts, most = [], largest_code(quantisation.bits)
    for number, (start, size) in enumerate(_starts(sizes)):
        part = np.ascontiguousarray(values[start : start + size], np.float32)
        step = quantisation.steps[number]
        codes = np.rint(part / np.float64(step))
        # NaN compares as false, so it is refused too.
        if not (np.abs(codes) <= most).all() or not np.array_equal((codes * step).astype(np.float32), part):
            raise ValueError(f"block {number}: a value is no multiple of {step:g}, or beyond {most} of them")
        parts.append(pack_codes(codes.astype(np.int8), quantisation.bits))
    return b"".join(parts)


def decode_codes(data: bytes | memoryview, sizes: Sequence[int], quantisation: Quantisation) -> Values:
    """The values of packed codes, shape (sum of sizes,), float32; each product is made in float64 and rounded once.

    Raises:
        ValueError: (for the caller to name) see :func:`edge_runtime.wire.codes.unpack_codes`.
    """
    import numpy as np

    values = np.empty(sum(sizes), np.float32)
    at = 0
    for number, (start, size) in enumerate(_starts(sizes)):
        end = at + packed_bytes(size, quantisation.bits)
        try:
            codes = unpack_codes(data[at:end], size, quantisation.bits)
        except ValueError as error:
            raise ValueError(f"block {number}: {error}") from error
        values[start : start + size] = codes * np.float64(quantisation.steps[number])
        at = end
    return values


def _starts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where every block begins, and its size."""
    start = 0
    for size in sizes:
        yield start, size
        start += size
