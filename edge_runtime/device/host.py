"""What a device takes from the machine besides files and sockets: time, randomness, sleep. Passed in, never global."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from edge_runtime.device.conditions import conditions
from edge_runtime.device.eligibility import Conditions
from edge_runtime.device.errors import TransportError


@dataclass(frozen=True)
class Host:
    """Clock in Unix seconds, entropy for nonces and keys, a generator for jitter only, sleep in seconds, and what the
    system tells of power, temperature and memory."""

    clock: Callable[[], float] = time.time
    entropy: Callable[[int], bytes] = os.urandom
    rng: random.Random = field(default_factory=random.Random)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    conditions: Callable[[], Conditions] = conditions


@dataclass
class Backoff:
    """Exponential waits with jitter, between half and all of ``base_s · 2**n``, never more than ``cap_s``.

    A server's hint is obeyed instead, up to a quarter late so that devices do not return together, and at most
    ``hint_cap_s``: nobody can send a device to sleep for ever.
    """

    host: Host
    base_s: float = 1.0
    cap_s: float = 60.0
    hint_cap_s: float = 900.0
    attempts: int = 0
    since: float | None = None  # Unix seconds of the first failure in a row

    def reset(self) -> None:
        """Something worked."""
        self.attempts, self.since = 0, None

    def next_wait(self, error: Exception) -> tuple[float, float]:
        """How long to wait now, and for how long things have failed already, both in seconds."""
        now = self.host.clock()
        if self.since is None:
            self.since = now
        waited = max(0.0, now - self.since)
        if isinstance(error, TransportError):
            if error.progress:
                self.attempts = 0
            if error.retry_after_s is not None and error.retry_after_s > 0:
                return min(error.retry_after_s, self.hint_cap_s) * (1 + self.host.rng.random() / 4), waited
        # 2**16 is far past any cap; the bound keeps the power small after weeks of failures.
        longest = min(self.cap_s, self.base_s * 2.0 ** min(self.attempts, 16))
        self.attempts += 1
        return longest * (0.5 + self.host.rng.random() / 2), waited
