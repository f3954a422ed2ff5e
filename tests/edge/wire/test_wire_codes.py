"""Packed codes: their bytes, a round trip, and every way to be wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire.codes import Bits, largest_code, pack_codes, packed_bytes, unpack_codes


def test_golden_bytes() -> None:
    codes = np.array([1, -1, 7, -7, 3], np.int8)
    assert pack_codes(codes, 4).hex() == "f19703"  # 1 and -1 (0xf); 7 and -7 (0x9); 3 and the spare half
    assert pack_codes(codes, 8).hex() == "01ff07f903"
    ternary = np.array([1, -1, 0, 0, -1, 1, -1], np.int8)
    assert pack_codes(ternary, 2).hex() == "a907"  # 1 + 2 · 3 + 2 · 81 = 169; 1 + 2 · 3, and three digits left over


@given(st.sampled_from([2, 4, 8]), st.data())
def test_what_is_packed_comes_back(bits: Bits, data: st.DataObject) -> None:
    most = largest_code(bits)
    codes = np.array(data.draw(st.lists(st.integers(-most, most), max_size=50)), np.int8)
    packed = pack_codes(codes, bits)
    assert len(packed) == packed_bytes(len(codes), bits)
    np.testing.assert_array_equal(unpack_codes(packed, len(codes), bits), codes)


@pytest.mark.parametrize(
    ("data", "count", "bits", "message"),
    [
        (b"\x00", 3, 4, "expected 2 bytes for 3 of 4 bits, got 1"),
        (b"\x00\x00", 1, 8, "expected 1 bytes for 1 of 8 bits, got 2"),
        (b"\x10", 1, 4, "left over"),
        (b"\x08", 2, 4, "at least -7, got -8"),
        (b"\x80", 1, 8, "at least -127, got -128"),
        (b"\x00\x00", 5, 2, "expected 1 bytes for 5 of 2 bits, got 2"),
        (b"\x03", 1, 2, "digits that are left over"),
        (b"\xf3", 5, 2, "below 243, got 243"),
    ],
)
def test_hostile_bytes(data: bytes, count: int, bits: Bits, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_codes(data, count, bits)
