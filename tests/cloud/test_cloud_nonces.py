"""Which requests are remembered, for how long, and who is held back by whose."""

from __future__ import annotations

import tracemalloc

import pytest

from cloud.http.signed import NonceMemory
from edge_runtime.wire import RateLimitedError, SignedRequest, UnavailableError
from edge_runtime.wire.messages import OPERATOR
from edge_runtime.wire.requests import EMPTY_BODY, MAX_CLOCK_SKEW_S


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def request(device: str, nonce: int, ahead: int = 0) -> SignedRequest:
    """``ahead``: seconds of its stamp before the server's clock."""
    return SignedRequest(device, "GET", "/", EMPTY_BODY, 1_000 + ahead, f"{nonce:032x}")


@pytest.mark.parametrize("ahead", [-MAX_CLOCK_SKEW_S, 0, MAX_CLOCK_SKEW_S])
def test_a_nonce_is_known_for_as_long_as_its_stamp_passes(ahead: int) -> None:
    """A stamp one skew ahead of the server's clock passes for two. A minute later, by which a clock may go back, the
    nonce is still known; after another it need not be."""
    clock = Clock()
    memory = NonceMemory(clock)
    assert not memory.seen(request("one", 1, ahead))
    assert memory.seen(request("one", 1, ahead))
    assert not memory.seen(request("two", 1, ahead))
    clock.now += MAX_CLOCK_SKEW_S + ahead + 60
    assert memory.seen(request("one", 1, ahead))
    clock.now += 60
    assert not memory.seen(request("one", 1, ahead))


def test_a_device_that_floods_is_held_back_alone() -> None:
    """Its replays are still told apart, others and the operator are served, and in time it is heard again."""
    clock = Clock()
    memory = NonceMemory(clock, per_device=3)
    assert not any(memory.seen(request("flood", nonce)) for nonce in range(3))
    for nonce in (3, 4):
        with pytest.raises(RateLimitedError, match="device flood: expected at most 3 requests in 6 minutes"):
            memory.seen(request("flood", nonce))
    assert memory.seen(request("flood", 0))
    assert not memory.seen(request("calm", 0))
    assert not memory.seen(request(OPERATOR, 0))
    clock.now += MAX_CLOCK_SKEW_S + 120
    assert not memory.seen(request("flood", 3))
    assert [one.held for one in memory._slices.values()] == [{"flood": 1}]  # of devices long not heard of, nothing


def test_all_devices_together_have_a_bound_too() -> None:
    memory = NonceMemory(Clock(), capacity=2)
    assert not memory.seen(request("one", 0))
    assert not memory.seen(request("two", 0))
    with pytest.raises(UnavailableError, match="too many requests"):
        memory.seen(request("three", 0))


def test_ten_thousand_nonces_take_less_than_a_megabyte() -> None:
    """They are what a busy aggregator's memory grew by, 290 bytes each."""
    memory = NonceMemory(Clock())
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for nonce in range(10_000):
            memory.seen(request(f"device-{nonce % 100}", nonce))
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 1_000_000
