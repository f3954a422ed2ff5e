"""Small signed integers as bytes: how quantised tensors travel, up and down.

A code of b bits lies between −(2^(b−1) − 1) and 2^(b−1) − 1, so that zero stands in the middle and a change and its
opposite are rounded alike; the one pattern left over is refused. Eight bits are one byte each. Of four bits two share a
byte, the first in the low half; an odd last one leaves the high half zero. Codes of two bits are ternary, and five of
them share a byte, see :mod:`edge_runtime.wire.ternary`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from edge_runtime.wire.ternary import A_BYTE, pack_ternary, unpack_ternary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Codes = npt.NDArray[np.int8]

Bits = Literal[8, 4, 2]
UpdateBits = Literal[32, 8, 4, 2]  # of a value, 32 where there are no codes
_BYTE = {8: 1, 4: 2, 2: A_BYTE}  # codes of so many bits that share one


def largest_code(bits: Bits) -> int:
    """The largest code: 127 of eight bits, 7 of four, 1 of two."""
    return (1 << (bits - 1)) - 1


def packed_bytes(count: int, bits: Bits) -> int:
    """Length in bytes of ``count`` packed codes."""
    return -(-count // _BYTE[bits])


def pack_codes(codes: Codes, bits: Bits) -> bytes:
    """Pack codes, shape (count,), int8, all within ±:func:`largest_code`; the caller has clipped them."""
    import numpy as np

    if bits == 8:
        return codes.tobytes()
    if bits == 2:
        return pack_ternary(codes)
    halves = np.zeros(codes.size + codes.size % 2, np.uint8)
    halves[: codes.size] = codes.view(np.uint8) & 0xF
    return (halves[::2] | halves[1::2] << 4).astype(np.uint8).tobytes()


def unpack_codes(data: bytes | memoryview, count: int, bits: Bits) -> Codes:
    """Read ``count`` codes, shape (count,), int8.

    Raises:
        ValueError: (for the caller to name) another length than ``count`` codes have, a code that none is, or a spare
            half that is not zero.
    """
    import numpy as np

    expected = packed_bytes(count, bits)
    if len(data) != expected:
        raise ValueError(f"codes: length: expected {expected} bytes for {count} of {bits} bits, got {len(data)}")
    raw = np.frombuffer(data, np.uint8)
    if bits == 8:
        codes = raw.view(np.int8)
    elif bits == 2:
        codes = unpack_ternary(raw, count)
    else:
        halves = np.empty(2 * raw.size, np.uint8)
        halves[::2], halves[1::2] = raw & 0xF, raw >> 4
        if count % 2 and halves[-1]:
            raise ValueError("codes: the half byte that is left over is not zero")
        codes = (halves[:count] ^ 8).view(np.int8) - np.int8(8)  # two's complement of four bits
    if codes.size and int(codes.min()) < -largest_code(bits):
        raise ValueError(f"codes: expected at least {-largest_code(bits)}, got {int(codes.min())}")
    return codes
