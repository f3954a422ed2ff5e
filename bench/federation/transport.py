"""The aggregator as a device in the same process reaches it: the same calls that the HTTP handlers make, no sockets.

What is left out is HTTP with its headers and the signatures on requests. Plans are signed and checked, updates sealed
and opened, adapters verified, and everything is stored, as between machines. Bytes are those of bodies.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator
from pathlib import Path

from cloud.service import Aggregator
from edge_runtime.bundle import Manifest, map_tensors
from edge_runtime.device.records import Pending
from edge_runtime.device.transport import BlobAnswer, PlanAnswer, Traffic
from edge_runtime.wire import Capability, Plan, PlanKeyChain, UpdateReceipt, adapter_layout
from edge_runtime.wire.patch_frame import VERSION, parse_patch, shape_of

_PIECE = 1 << 20


class MemoryTransport:
    """Implements :class:`edge_runtime.device.transport.Transport` for one device."""

    def __init__(self, aggregator: Aggregator, device: str, manifest: Manifest) -> None:
        self.traffic = Traffic()
        self.params_down = 0  # values of factors
        self.head_down = 0  # bytes of a frozen head within ``traffic.down``
        self._aggregator = aggregator
        self._device = device
        self._manifest = manifest
        self._plan: Plan | None = None  # the one the device was given last

    async def plan(self, task: str, *, after: int, wait_s: int) -> PlanAnswer:
        """The plan, as the long poll gives it."""
        signed = await self._aggregator.plan_after(self._device, task=task, after=after, wait_s=wait_s)
        if signed is None:
            return PlanAnswer(None)
        self._plan = signed.plan
        self.traffic.down += len(signed.deflated)
        return PlanAnswer(signed.data)

    async def plan_keys(self, task: str) -> PlanKeyChain:
        """Every change of the plan key."""
        return self._aggregator.keyring.chain

    @contextlib.asynccontextmanager
    async def blob(self, digest: str, *, offset: int) -> AsyncIterator[BlobAnswer]:
        """A file of the aggregator's disk."""
        path = self._aggregator.blob_path(digest)
        self.params_down += sum(array.size for array in map_tensors(path).values())  # homes lack only adapters
        yield BlobAnswer(offset, self._pieces(path, offset))

    @contextlib.asynccontextmanager
    async def patch(self, task: str, round_: int, *, since: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """What makes the adapter of the plan the device was given."""
        data = await self._aggregator.patch(self._device, task=task, round_=round_, since=since, reads=VERSION)
        assert self._plan is not None, "a device asks for a plan first"
        layout = adapter_layout(self._plan.ranks, self._manifest.features, self._manifest.head_shapes)
        frame = parse_patch(data, since=since, round_=round_, digest=self._plan.adapter, layout=layout)
        shapes = dict(layout.blocks)
        factors = {name: part for name, part in frame.parts.items() if name not in self._manifest.head_shapes}
        self.params_down += sum(
            math.prod(shape_of(name, shapes[name], len(part.numbers))) for name, part in factors.items()
        )
        if len(factors) < len(frame.parts):  # the head is fetched once; its share of the patch is counted apart
            self.head_down += len(data) - len(frame.only(tuple(factors)).encode())
        yield self._whole(data)

    async def upload(self, pending: Pending, sealed: bytes) -> UpdateReceipt:
        """Ask whether the update may come, then hand it over."""
        answer = await self._aggregator.admit(
            self._device, task=pending.task, round_=pending.round, digest=pending.digest
        )
        if isinstance(answer, UpdateReceipt):
            return answer
        self.traffic.up += len(sealed)
        receipt, _ = await self._aggregator.submit(
            self._device, round_=pending.round, digest=pending.digest, sealed=sealed
        )
        return receipt

    async def tell(self, task: str, capability: Capability) -> None:
        """What the device measured of itself."""
        await self._aggregator.tell(self._device, task=task, capability=capability)

    async def _whole(self, data: bytes) -> AsyncIterator[bytes]:
        self.traffic.down += len(data)
        yield data

    async def _pieces(self, path: Path, offset: int) -> AsyncIterator[bytes]:
        with path.open("rb") as file:
            file.seek(offset)
            while piece := file.read(_PIECE):
                self.traffic.down += len(piece)
                yield piece
