"""What an enrolled device needs from the way to its aggregator: plans, blobs, patches; updates go, bytes are counted.

:class:`edge_runtime.device.client.Client` goes over HTTP. Anything else that keeps these rules, such as a call in the
same process, gives the same device.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from edge_runtime.device.records import Pending
from edge_runtime.wire import Capability, PlanKeyChain, SignedRequest, UpdateReceipt

_LEAST_BYTES = 64 << 10  # smaller bodies fit into buffers on the way, and their time is that of the request


@dataclass
class Pace:
    """How fast bodies went one way: all bytes by all seconds, those of connecting and answering included."""

    bytes: int = 0
    seconds: float = 0.0

    def add(self, size: int, seconds: float) -> None:
        """Note a body that went whole; small ones say nothing of the link."""
        if size >= _LEAST_BYTES and seconds > 0:
            self.bytes += size
            self.seconds += seconds

    @property
    def bytes_s(self) -> float | None:
        """Bytes a second; None before a body was large enough."""
        return self.bytes / self.seconds if self.seconds else None


@dataclass
class Traffic:
    """Bytes of bodies that went over the network, repeats included, and how fast they went in this process."""

    up: int = 0
    down: int = 0
    pace_up: Pace = field(default_factory=Pace)
    pace_down: Pace = field(default_factory=Pace)
    round_trip_s: float | None = None  # until a request is answered, connecting included; the shortest seen

    def answered(self, seconds: float) -> None:
        """Note how long a request that is answered at once took."""
        if seconds > 0:
            self.round_trip_s = min(seconds, self.round_trip_s or seconds)


@dataclass(frozen=True)
class PlanAnswer:
    """Plan bytes, nothing checked; None when there is no new plan, with the server's hint when to ask again.

    Attributes:
        request: What the plan must have been made the answer to; None where nobody is between the two sides.
        proof: That it was; see :mod:`edge_runtime.wire.freshness`.
    """

    data: bytes | None
    retry_after_s: float | None = None
    request: SignedRequest | None = None
    proof: str | None = None


@dataclass(frozen=True)
class BlobAnswer:
    """Bytes of a blob from ``start`` on; None when the answer's range is not the one asked for."""

    start: int | None
    pieces: AsyncIterator[bytes]


class Transport(Protocol):
    """What the server refuses is raised as the wire's own error, whatever is no answer of it as ``TransportError``."""

    traffic: Traffic

    async def plan(self, task: str, *, after: int, wait_s: int) -> PlanAnswer:
        """Wait, at most ``wait_s`` seconds, for the first plan of a round after ``after``."""

    async def plan_keys(self, task: str) -> PlanKeyChain:
        """Every change of the key that signs plans."""

    def blob(self, digest: str, *, offset: int) -> AbstractAsyncContextManager[BlobAnswer]:
        """Open a blob from byte ``offset`` on."""

    def patch(self, task: str, round_: int, *, since: int) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Open the patch from the adapter of round ``since`` (-1: the bundle's) to that of ``round_``."""

    async def upload(self, pending: Pending, sealed: bytes) -> UpdateReceipt:
        """Send a sealed update."""

    async def tell(self, task: str, capability: Capability) -> None:
        """Say what this device measured of itself."""
