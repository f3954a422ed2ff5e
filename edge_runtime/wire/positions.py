"""Which of many values are there: k positions of n, in a length that follows from both numbers.

The shorter of two forms is taken. A bitmap has n bits, the first position in the lowest bit of the first byte.
Elias-Fano (Elias 1974; Fano 1971; Vigna, WSDM 2013) writes of every position its l lowest bits, l = ⌊log₂(n/k)⌋, in
rising order, then what is above them in unary: bit ``(p >> l) + i`` is set for the i-th position p, counted from 0.
Both parts begin at a byte, bits fill bytes from the lowest. That is about l + 2 bits a position, at most 0.8 above what
any code of sets of this size needs. A set has one encoding; whatever is none is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Flags = npt.NDArray[np.bool_]


def positions_bytes(count: int, of: int) -> int:
    """Length in bytes of ``count`` positions of ``of``, 0 ≤ count ≤ of."""
    return min(_bytes(of), sum(_parts(count, of)))


def pack_positions(flags: Flags) -> bytes:
    """The positions of what is True in ``flags``, shape (n,)."""
    import numpy as np

    count, of = int(np.count_nonzero(flags)), flags.size
    if not count:
        return b""
    if _bytes(of) <= sum(_parts(count, of)):
        return _packed(flags)
    low_bits, places = _low_bits(count, of), np.flatnonzero(flags)
    high = np.zeros(_high_bits(count, of), np.bool_)
    high[(places >> low_bits) + np.arange(count)] = True
    low = (places[:, None] >> np.arange(low_bits)) & 1
    return _packed(low.ravel().astype(np.bool_)) + _packed(high)


def unpack_positions(data: bytes | memoryview, count: int, of: int) -> Flags:
    """Read ``count`` positions of ``of`` as flags, shape (of,).

    Raises:
        ValueError: (for the caller to name) another length or number of positions, positions that do not rise or lie
            beyond the end, or spare bits that are not zero.
    """
    import numpy as np

    expected = positions_bytes(count, of)
    if len(data) != expected:
        raise ValueError(f"positions: length: expected {expected} bytes for {count} of {of}, got {len(data)}")
    if not count:
        return np.zeros(of, np.bool_)
    low_bytes, high_bytes = _parts(count, of)
    if _bytes(of) <= low_bytes + high_bytes:
        flags = _unpacked(data, of)
        if (found := int(np.count_nonzero(flags))) != count:
            raise ValueError(f"positions: expected {count}, got {found}")
        return flags
    low_bits = _low_bits(count, of)
    high = np.flatnonzero(_unpacked(data[low_bytes:], _high_bits(count, of)))
    if high.size != count:
        raise ValueError(f"positions: expected {count}, got {high.size}")
    low = _unpacked(data[:low_bytes], count * low_bits).reshape(count, low_bits)
    places = (high - np.arange(count) << low_bits) + low @ (1 << np.arange(low_bits))
    if not (np.diff(places) > 0).all() or int(places[-1]) >= of:
        raise ValueError(f"positions: expected rising ones below {of}")
    flags = np.zeros(of, np.bool_)
    flags[places] = True
    return flags


def _low_bits(count: int, of: int) -> int:
    """Bits of a position that are written as they are."""
    return (of // count).bit_length() - 1


def _high_bits(count: int, of: int) -> int:
    """Bits of the unary part."""
    return count + ((of - 1) >> _low_bits(count, of))


def _parts(count: int, of: int) -> tuple[int, int]:
    """Bytes of the two parts of Elias-Fano; without a position there is nothing to write."""
    if not count:
        return 0, 0
    return _bytes(count * _low_bits(count, of)), _bytes(_high_bits(count, of))


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _packed(bits: Flags) -> bytes:
    import numpy as np

    return np.packbits(bits, bitorder="little").tobytes()


def _unpacked(data: bytes | memoryview, count: int) -> Flags:
    """So many bits; those left over in the last byte must be zero."""
    import numpy as np

    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if bits[count:].any():
        raise ValueError("positions: the bits that are left over are not zero")
    return bits[:count].astype(np.bool_)
