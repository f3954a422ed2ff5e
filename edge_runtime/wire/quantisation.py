"""Updates in few bits: what a plan says about them, and values as packed codes.

Every block of an update has one range, named by the plan and the same for every device, so that the codes of several
devices could be added before anybody turns them into values. A code c of a block stands for ``c · range / most``, most
being 127, 7 or 1. How a device rounds a change to such values is its own affair: :mod:`edge_runtime.training.quantise`.

A plan may also have a density below 1: an update then holds so many of the layout's values and no more, wherever they
are, first their positions and then their codes; all others are 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

from edge_runtime.wire.codes import Bits, largest_code, pack_codes, packed_bytes, unpack_codes
from edge_runtime.wire.positions import pack_positions, positions_bytes, unpack_positions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float32]
    Codes = npt.NDArray[np.int8]


class Quantisation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How values are sent in few bits.

    Attributes:
        bits: Of a code.
        ranges: For every block of the layout, in its order, the largest absolute change a code can say.
        density: Share of the values that an update holds, more than 0, less than 1; left out: all of them.
    """

    bits: Bits
    ranges: tuple[float, ...]
    density: float | msgspec.UnsetType = msgspec.UNSET

    @classmethod
    def of(cls, bits: Bits, ranges: tuple[float, ...], density: float) -> Quantisation:
        """With the spelling that plans have of a density of 1."""
        return cls(bits, ranges, density if density < 1 else msgspec.UNSET)

    def held(self, count: int) -> int:
        """How many of ``count`` values an update holds: at least one where there are any."""
        return count if self.density is msgspec.UNSET else math.ceil(self.density * count)

    @property
    def steps(self) -> tuple[float, ...]:
        """What one code of each block stands for."""
        return tuple(range_ / largest_code(self.bits) for range_ in self.ranges)


def payload_bytes(sizes: Sequence[int], quantisation: Quantisation) -> int:
    """Length of the payload of blocks of these numbers of values; each block starts at a byte, but for held ones."""
    if quantisation.density is msgspec.UNSET:
        return sum(packed_bytes(size, quantisation.bits) for size in sizes)
    count = sum(sizes)
    held = quantisation.held(count)
    return positions_bytes(held, count) + packed_bytes(held, quantisation.bits)


def encode_codes(values: Values, sizes: Sequence[int], quantisation: Quantisation) -> bytes:
    """Values as packed codes, block after block; with a density after the positions of those that are held.

    Args:
        values: Flat, shape (sum of sizes,), float32; each the very value that its code stands for.
        sizes: Number of values of every block.
        quantisation: One range a block.

    Raises:
        ValueError: (for the caller to name) a value that no code stands for, or more values than are held. Nothing is
            rounded here.
    """
    parts = _codes(values, sizes, quantisation)
    if quantisation.density is msgspec.UNSET:
        return b"".join(pack_codes(codes, quantisation.bits) for codes in parts)
    import numpy as np

    codes = np.concatenate(parts) if parts else np.zeros(0, np.int8)
    flags, held = codes != 0, quantisation.held(codes.size)
    spare = held - int(np.count_nonzero(flags))
    if spare < 0:
        raise ValueError(f"expected at most {held} values that are not 0, got {held - spare}")
    flags[np.flatnonzero(~flags)[:spare]] = True  # a length that follows from the plan wants as many, 0 or not
    return pack_positions(flags) + pack_codes(codes[flags], quantisation.bits)


def _codes(values: Values, sizes: Sequence[int], quantisation: Quantisation) -> list[Codes]:
    """The codes of every block."""
    import numpy as np

    parts, most = [], largest_code(quantisation.bits)
    for number, (start, size) in enumerate(_starts(sizes)):
        part = np.ascontiguousarray(values[start : start + size], np.float32)
        step = quantisation.steps[number]
        codes = np.rint(part / np.float64(step))
        # NaN compares as false, so it is refused too.
        if not (np.abs(codes) <= most).all() or not np.array_equal((codes * step).astype(np.float32), part):
            raise ValueError(f"block {number}: a value is no multiple of {step:g}, or beyond {most} of them")
        parts.append(codes.astype(np.int8))
    return parts


def decode_codes(data: bytes | memoryview, sizes: Sequence[int], quantisation: Quantisation) -> Values:
    """The values of a payload, shape (sum of sizes,), float32; each product is made in float64 and rounded once.

    Raises:
        ValueError: (for the caller to name) see :func:`edge_runtime.wire.codes.unpack_codes` and
            :func:`edge_runtime.wire.positions.unpack_positions`.
    """
    import numpy as np

    if quantisation.density is not msgspec.UNSET:
        codes = _held_codes(data, sum(sizes), quantisation)
        parts = [codes[start : start + size] for start, size in _starts(sizes)]
    else:
        parts = list(_block_codes(data, sizes, quantisation.bits))
    values = np.empty(sum(sizes), np.float32)
    for (start, size), part, step in zip(_starts(sizes), parts, quantisation.steps, strict=True):
        values[start : start + size] = part * np.float64(step)
    return values


def _held_codes(data: bytes | memoryview, count: int, quantisation: Quantisation) -> Codes:
    """The codes of all values where only some are held, shape (count,)."""
    import numpy as np

    held = quantisation.held(count)
    end = positions_bytes(held, count)
    flags = unpack_positions(data[:end], held, count)
    codes = np.zeros(count, np.int8)
    codes[flags] = unpack_codes(data[end:], held, quantisation.bits)
    return codes


def _block_codes(data: bytes | memoryview, sizes: Sequence[int], bits: Bits) -> Iterator[Codes]:
    at = 0
    for number, size in enumerate(sizes):
        end = at + packed_bytes(size, bits)
        try:
            yield unpack_codes(data[at:end], size, bits)
        except ValueError as error:
            raise ValueError(f"block {number}: {error}") from error
        at = end


def _starts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where every block begins, and its size."""
    start = 0
    for size in sizes:
        yield start, size
        start += size
