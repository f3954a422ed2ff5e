"""Codes −1, 0 and 1 as bytes: five share one, as digits of base three, so that each takes 1.6 bits.

A digit is 0, 1, or 2 for −1; the first is the lowest. Digits that are left over are zero, bytes above 242 are none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Codes = npt.NDArray[np.int8]

A_BYTE = 5
_BYTES = 3**A_BYTE


def pack_ternary(codes: Codes) -> bytes:
    """Pack codes, shape (count,), int8, all of them -1, 0 or 1."""
    import numpy as np

    digits = np.zeros(-(-codes.size // A_BYTE) * A_BYTE, np.uint8)
    digits[: codes.size] = np.where(codes < 0, 2, codes)
    places = 3 ** np.arange(A_BYTE, dtype=np.uint8)
    return (digits.reshape(-1, A_BYTE) @ places).tobytes()


def unpack_ternary(raw: npt.NDArray[np.uint8], count: int) -> Codes:
    """Read ``count`` codes, shape (count,), int8, from as many bytes as they have.

    Raises:
        ValueError: (for the caller to name) a byte that is no five digits, or left over digits that are not zero.
    """
    if raw.size and int(raw.max()) >= _BYTES:
        raise ValueError(f"codes: expected bytes below {_BYTES}, got {int(raw.max())}")
    codes = _table()[raw].ravel()
    if codes[count:].any():
        raise ValueError("codes: the digits that are left over are not zero")
    return codes[:count]


@lru_cache(maxsize=1)
def _table() -> Codes:
    """The codes of every byte, shape (243, 5), int8."""
    import numpy as np

    digits = (np.arange(_BYTES)[:, None] // 3 ** np.arange(A_BYTE) % 3).astype(np.int8)
    return np.where(digits == 2, np.int8(-1), digits)
