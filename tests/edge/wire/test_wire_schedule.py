"""How learning rates fall."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire.schedule import END_SHARE, rate_share


def test_cosine_ends() -> None:
    assert rate_share("cosine", 0.0) == 1.0
    assert rate_share("cosine", 0.5) == pytest.approx((1 + END_SHARE) / 2)
    assert rate_share("cosine", 1.0) == pytest.approx(END_SHARE)


@given(st.floats(-1, 2), st.floats(-1, 2))
def test_shares_fall_and_stay_within_bounds(one: float, two: float) -> None:
    early, late = sorted((one, two))
    assert 1.0 >= rate_share("cosine", early) >= rate_share("cosine", late) >= END_SHARE - 1e-12
    assert rate_share("constant", one) == 1.0
