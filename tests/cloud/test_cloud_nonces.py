"""Which requests are remembered, for how long, and who is held back by whose."""

from __future__ import annotations

import pytest

from cloud.http.signed import NonceMemory
from edge_runtime.wire import RateLimitedError, SignedRequest, UnavailableError
from edge_runtime.wire.messages import OPERATOR
from edge_runtime.wire.requests import EMPTY_BODY, MAX_CLOCK_SKEW_S


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def request(device: str, nonce: int) -> SignedRequest:
    return SignedRequest(device, "GET", "/", EMPTY_BODY, 1_000, f"{nonce:032x}")


def test_a_nonce_is_known_for_as_long_as_its_stamp_would_pass() -> None:
    """A stamp one skew ahead of the server's clock passes for two; afterwards the nonce need not be known."""
    clock = Clock()
    memory = NonceMemory(clock)
    assert not memory.seen(request("one", 1))
    assert memory.seen(request("one", 1))
    assert not memory.seen(request("two", 1))
    clock.now += 2 * MAX_CLOCK_SKEW_S
    assert memory.seen(request("one", 1))
    clock.now += 0.5
    assert not memory.seen(request("one", 1))


def test_a_device_that_floods_is_held_back_alone() -> None:
    """Its replays are still told apart, others and the operator are served, and in time it is heard again."""
    clock = Clock()
    memory = NonceMemory(clock, per_device=3)
    assert not any(memory.seen(request("flood", nonce)) for nonce in range(3))
    for nonce in (3, 4):
        with pytest.raises(RateLimitedError, match="device flood: expected at most 3 requests in 10 minutes"):
            memory.seen(request("flood", nonce))
    assert memory.seen(request("flood", 0))
    assert not memory.seen(request("calm", 0))
    assert not memory.seen(request(OPERATOR, 0))
    clock.now += 2 * MAX_CLOCK_SKEW_S + 1
    assert not memory.seen(request("flood", 3))
    assert memory._held == {"flood": 1}  # nothing is kept of devices that were long not heard of


def test_all_devices_together_have_a_bound_too() -> None:
    memory = NonceMemory(Clock(), capacity=2)
    assert not memory.seen(request("one", 0))
    assert not memory.seen(request("two", 0))
    with pytest.raises(UnavailableError, match="too many requests"):
        memory.seen(request("three", 0))
