"""The network: the transport of a device, with faults that wait for the exchange that they are meant for.

What a request does at the server is what the HTTP handlers of :mod:`cloud.http.app` do. Of the signatures on requests
only the key is looked at, and nonces are left out, so that whatever was sent can be sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from cloud.http.parts import Part, PartsDesk
from cloud.service import Aggregator
from edge_runtime.device.errors import RefusedError, TransportError
from edge_runtime.device.records import Pending
from edge_runtime.device.transport import BlobAnswer, PlanAnswer, Traffic
from edge_runtime.wire import (
    Capability,
    NotNowError,
    PlanKeyChain,
    SignatureError,
    SignedPlan,
    UnknownDeviceError,
    UpdateDigestError,
    UpdateFormatError,
    UpdateOffsetError,
    UpdateProgress,
    UpdateReceipt,
    WireError,
    problem_for,
)
from edge_runtime.wire.patch_frame import VERSION
from tests.simulation import ops
from tests.simulation.ledger import Delivery, Ledger
from tests.simulation.loop import Process
from tests.simulation.server import Server, ServerDownError

if TYPE_CHECKING:
    from tests.simulation.device import Gate

_PARTS = 3  # of an update, where it is sent in parts
Handler = Callable[[Aggregator], Coroutine[Any, Any, Any]]
Fault = ops.Corrupt | ops.DropRequest | ops.DropResponse | ops.Delay | ops.HangUp


@dataclass(frozen=True)
class Sent:
    """An upload as it went over the network; ``key`` is the public one that its signature is checked with, hex."""

    device: str
    key: str
    task: str
    round: int
    digest: str
    data: bytes


@dataclass
class Network:
    """What all devices share."""

    server: Server
    ledger: Ledger
    sent: list[Sent] = field(default_factory=list)
    first_plan: bytes | None = None
    left: set[str] = field(default_factory=set)  # devices whose leaving was sent, whether or not it was answered
    late: list[asyncio.Task[None]] = field(default_factory=list)  # requests that are still under way

    def deliver(self, sent: Sent) -> Handler:
        """The handler of an upload; what it decides is written down."""

        async def take(aggregator: Aggregator) -> UpdateReceipt:
            delivery = Delivery(sent.device, sent.round, sent.digest)
            self.ledger.deliveries.append(delivery)
            with _refusals(aggregator, delivery):
                receipt = await _take_update(aggregator, sent)
            delivery.outcome = "acknowledged"
            return receipt

        return take

    def ask_progress(self, sent: Sent) -> Handler:
        """The handler that tells how much is there of an update in parts."""

        async def ask(aggregator: Aggregator) -> UpdateProgress:
            check_caller(aggregator, sent.device, sent.key)
            return await self._desk().progress(sent.device, task=sent.task, round_=sent.round, digest=sent.digest)

        return ask

    def deliver_part(self, sent: Sent, *, offset: int, of: int) -> Handler:
        """The handler of a part, ``sent.data``; the last one decides, and that is written down."""

        async def take(aggregator: Aggregator) -> UpdateProgress:
            check_caller(aggregator, sent.device, sent.key)
            part = Part(sent.device, sent.task, sent.round, sent.digest, offset, of, len(sent.data))
            delivery = Delivery(sent.device, sent.round, sent.digest)
            if offset + len(sent.data) == of:
                self.ledger.deliveries.append(delivery)

            async def read() -> bytes:
                await asyncio.sleep(0.002)  # the body comes in
                return sent.data

            with _refusals(aggregator, delivery):
                progress, _ = await self._desk().take(part, read)
            if progress.receipt is not None:
                delivery.outcome = "acknowledged"
            return progress

        return take

    def _desk(self) -> PartsDesk:
        assert self.server.desk is not None, "a handler runs"
        return self.server.desk

    def later(self, seconds: float, handler: Handler) -> None:
        """Let a request arrive whose sender has given it up."""

        async def arrive() -> None:
            await asyncio.sleep(seconds)
            with contextlib.suppress(ServerDownError, WireError):
                await self.server.call(handler)

        # In a context of its own: it goes on when its sender dies.
        self.late.append(contextvars.Context().run(asyncio.get_running_loop().create_task, arrive()))


@contextlib.contextmanager
def _refusals(aggregator: Aggregator, delivery: Delivery) -> Iterator[None]:
    """Write down why an update was refused, as the server does."""
    try:
        yield
    except WireError as error:
        delivery.outcome = problem_for(error).name
        with contextlib.suppress(UnknownDeviceError):
            aggregator.members.refused(delivery.device, problem_for(error).name)
        raise
    except Exception as error:
        delivery.outcome = type(error).__name__
        raise


def check_caller(aggregator: Aggregator, device: str, key: str) -> None:
    """What is left of the check of a request's signature.

    Raises:
        UnknownDeviceError: the device is none of the task.
        SignatureError: it was another one, of the same name, that signed.
    """
    if aggregator.members.key_of(device).public_bytes_raw().hex() != key:
        raise SignatureError(f"request of {device}: signed with another key")


async def _take_update(aggregator: Aggregator, sent: Sent) -> UpdateReceipt:
    check_caller(aggregator, sent.device, sent.key)
    answer = await aggregator.admit(sent.device, task=sent.task, round_=sent.round, digest=sent.digest)
    if isinstance(answer, UpdateReceipt):
        return answer
    if len(sent.data) not in answer:
        raise UpdateFormatError(f"update of {sent.device}: length {len(sent.data)}, expected one of {answer}")
    await asyncio.sleep(0.002)  # the body comes in
    found = hashlib.sha256(sent.data).hexdigest()
    if found != sent.digest:
        raise UpdateDigestError(f"body: expected digest {sent.digest[:12]}, got {found[:12]}")
    receipt, new = await aggregator.submit(sent.device, round_=sent.round, digest=sent.digest, sealed=sent.data)
    if new:
        aggregator.members.arrived(sent.device, sent.round, 0.002)
    return receipt


@dataclass
class Weather:
    """What will go wrong between a device and the server."""

    faults: list[Fault] = field(default_factory=list)
    old_plan: bool = False
    spoil: bool = False  # the device's update is sealed badly


class Owner(Protocol):
    """The device that a link belongs to."""

    number: int
    name: str
    in_parts: bool  # how it sends updates
    uploading: Gate
    weather: Weather

    @property
    def key(self) -> str:
        """The public key of its identity, hex."""


class Link:
    """Implements :class:`edge_runtime.device.transport.Transport`."""

    def __init__(self, network: Network, owner: Owner, process: Process | None = None) -> None:
        self.traffic = Traffic()
        self._network, self._owner, self._process = network, owner, process
        self._weather = owner.weather

    async def plan(self, task: str, *, after: int, wait_s: int) -> PlanAnswer:
        """The plan, as the long poll gives it; or the task's first one."""
        name, key, network = self._owner.name, self._owner.key, self._network

        async def ask(aggregator: Aggregator) -> SignedPlan | None:
            check_caller(aggregator, name, key)
            signed = await aggregator.plan_after(name, task=task, after=after, wait_s=wait_s)
            if signed is not None:
                network.ledger.planned(signed.plan.round)
            return signed

        signed, spoilt = await self._exchange("plan", ask)
        if signed is None:
            return PlanAnswer(None, 0.0)
        data = signed.data
        network.first_plan = network.first_plan or data
        if self._weather.old_plan:
            self._weather.old_plan, data = False, network.first_plan
        self.traffic.down += len(data)
        return PlanAnswer(_spoilt(data) if spoilt else data)

    async def plan_keys(self, task: str) -> PlanKeyChain:
        """Every change of the plan key."""
        name, key = self._owner.name, self._owner.key

        async def ask(aggregator: Aggregator) -> PlanKeyChain:
            check_caller(aggregator, name, key)
            return aggregator.keyring.chain

        chain, _ = await self._exchange("plan", ask)
        assert isinstance(chain, PlanKeyChain), "which is what the handler gives"
        return chain

    @contextlib.asynccontextmanager
    async def blob(self, digest: str, *, offset: int) -> AsyncIterator[BlobAnswer]:
        """A file of the server's disk."""

        name, key = self._owner.name, self._owner.key

        async def ask(aggregator: Aggregator) -> bytes:
            check_caller(aggregator, name, key)
            return aggregator.blob_path(digest).read_bytes()[offset:]

        data, spoilt = await self._exchange("blob", ask)
        yield BlobAnswer(offset, self._pieces(data, spoilt))

    @contextlib.asynccontextmanager
    async def patch(self, task: str, round_: int, *, since: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """A patch."""
        name, key = self._owner.name, self._owner.key

        async def ask(aggregator: Aggregator) -> bytes:
            check_caller(aggregator, name, key)
            return await aggregator.patch(name, task=task, round_=round_, since=since, reads=VERSION)

        data, spoilt = await self._exchange("patch", ask)
        yield self._pieces(data, spoilt)

    async def _pieces(self, data: bytes, spoilt: bool) -> AsyncIterator[bytes]:
        self.traffic.down += len(data)
        half = len(data) // 2
        yield data[:half]
        yield _spoilt(data[half:]) if spoilt and half else data[half:]

    async def upload(self, pending: Pending, sealed: bytes) -> UpdateReceipt:
        """Send an update once the scenario lets it go."""
        await self._owner.uploading.passed()
        data, digest = sealed, pending.digest
        self._network.ledger.sends(self._owner.number, pending.round, digest)
        if self._weather.spoil:
            data = _spoilt(data)
            digest = hashlib.sha256(data).hexdigest()
            self._network.ledger.sends(self._owner.number, pending.round, digest)
        self.traffic.up += len(data)
        sent = Sent(self._owner.name, self._owner.key, pending.task, pending.round, digest, data)
        self._network.sent.append(sent)
        if self._owner.in_parts:
            receipt = await self._in_parts(sent)
        else:
            receipt, _ = await self._exchange("upload", self._network.deliver(sent), body=sent)
        if (receipt.round, receipt.digest) != (pending.round, pending.digest):
            raise RefusedError("the receipt is for another update")
        assert isinstance(receipt, UpdateReceipt), "which is what the handler gives"
        return receipt

    async def _in_parts(self, sent: Sent) -> UpdateReceipt:
        """Ask how much is there and send what follows, as the real client does; a part may fail like a whole one."""
        progress, _ = await self._exchange("upload", self._network.ask_progress(sent))
        size = -(-len(sent.data) // _PARTS)
        while progress.receipt is None:
            start = progress.received
            part = replace(sent, data=sent.data[start : start + size])
            handler = self._network.deliver_part(part, offset=start, of=len(sent.data))
            try:
                progress, _ = await self._exchange("upload", handler)
            except UpdateOffsetError as error:  # an earlier request is carried out late
                raise TransportError(str(error), progress=True) from error
        receipt: UpdateReceipt = progress.receipt
        return receipt

    async def tell(self, task: str, capability: Capability) -> None:
        """What the device measured of itself."""
        name, key = self._owner.name, self._owner.key

        async def ask(aggregator: Aggregator) -> None:
            check_caller(aggregator, name, key)
            await aggregator.tell(name, task=task, capability=capability)

        await self._exchange("tell", ask)

    async def ask(self, part: ops.Part, handler: Handler) -> Any:
        """Another exchange.

        Raises:
            TransportError, WireError: see :meth:`_exchange`.
        """
        answer, _ = await self._exchange(part, handler)
        return answer

    async def _exchange(self, part: ops.Part, handler: Handler, *, body: Sent | None = None) -> tuple[Any, bool]:
        """The server's answer, and whether its bytes are to be spoilt; as the real client tells errors.

        Raises:
            TransportError: no answer, or "not now".
            WireError: the server's refusal.
        """
        self._instant(f"request {part}")
        await asyncio.sleep(0.001)
        fault = self._take_fault(part)
        server = self._network.server
        cut_s = fault.seconds if isinstance(fault, ops.HangUp) else None
        if isinstance(fault, ops.DropRequest):
            raise TransportError("the simulated network lost the request")
        if isinstance(fault, ops.Corrupt) and body is not None:
            handler = self._network.deliver(replace(body, data=_spoilt(body.data)))
        if isinstance(fault, ops.Delay):
            self._network.later(fault.seconds, handler)
            raise TransportError("the simulated network is slow")
        try:
            answer = await server.call(handler, cut_s=cut_s)
        except ServerDownError as error:
            raise TransportError(str(error)) from error
        except NotNowError as error:
            raise TransportError(str(error), retry_after_s=problem_for(error).retry_s) from error
        finally:
            self._instant(f"response {part}")
        await asyncio.sleep(0.001)
        if isinstance(fault, ops.DropResponse):
            raise TransportError("the simulated network lost the answer")
        return answer, isinstance(fault, ops.Corrupt)

    def _instant(self, name: str) -> None:
        if self._process is not None:
            self._process.instant(name)

    def _take_fault(self, part: ops.Part) -> Fault | None:
        for number, fault in enumerate(self._weather.faults):
            if fault.part == part:
                return self._weather.faults.pop(number)
        return None


def _spoilt(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]
