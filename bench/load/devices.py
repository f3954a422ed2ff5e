"""Devices that send updates and do nothing else: enrolled, signing and sealing as the contract wants, over connections
that stay open.

Requests are written to sockets by hand, so that what is measured is the aggregator and not a client library.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from bench.errors import UnavailableError
from bench.load.server import TASK, Served
from cloud.operator import OperatorClient
from cloud.planning import plan_layout
from edge_runtime import wire
from edge_runtime.bundle import Bundle
from edge_runtime.wire import resources

_TOKEN_S = 3600
_PLAN_WAIT_S = 30


@dataclass
class Connection:
    """One connection to the aggregator; requests go one after the other."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, url: str) -> Connection:
        """Connect to ``http://host:port``."""
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port))

    async def ask(self, method: str, target: str, body: bytes = b"", authorization: str = "") -> tuple[int, bytes]:
        """Status and body of the answer."""
        signed = f"Authorization: {authorization}\r\n" if authorization else ""
        head = f"{method} {target} HTTP/1.1\r\nHost: load\r\n{signed}Content-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode())
        self.writer.write(body)
        await self.writer.drain()
        status = int((await self.reader.readline()).split()[1])
        length = 0
        while line := (await self.reader.readline()).strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, await self.reader.readexactly(length)

    def close(self) -> None:
        """Hang up."""
        self.writer.close()


@dataclass
class LoadDevice:
    """A name and a key."""

    name: str
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def authorization(self, method: str, target: str, digest: str) -> str:
        """Of a request whose body has this digest."""
        nonce = secrets.token_hex(16)
        request = wire.SignedRequest(self.name, method, target, digest, int(time.time()), nonce)
        return wire.authorization(request, self.key)


@dataclass(frozen=True)
class Parcel:
    """A sealed update, ready to be sent."""

    device: LoadDevice
    target: str
    sealed: bytes
    digest: str  # of it, hex


class Crowd:
    """The devices of one aggregator."""

    def __init__(self, served: Served, bundle: Bundle, devices: Sequence[LoadDevice], plan_key: str) -> None:
        self._served = served
        self._bundle = bundle
        self._devices = devices
        self._plan_key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(plan_key))

    @classmethod
    async def enrol(cls, served: Served, bundle: Bundle, count: int) -> Crowd:
        """So many devices, each with a token of the operator's.

        Raises:
            UnavailableError: one was refused.
        """
        operator = OperatorClient.of_folder(served.config.data_path, clock=time.time, entropy=secrets.token_bytes)
        devices = [LoadDevice(f"device-{number:05d}") for number in range(count)]
        connection = await Connection.open(served.url)
        plan_key = ""
        for device in devices:
            token = wire.Token.parse((await operator.make_token(device.name, _TOKEN_S)).token)
            key = device.key.public_key().public_bytes_raw().hex()
            body = wire.encode_message(wire.Enrolment(token=token.secret, device=device.name, signing_key=key))
            answer = _good(await connection.ask("POST", resources.ENROLMENTS, body), f"enrolment of {device.name}")
            plan_key = wire.decode_message(answer, wire.Enrolled).plan_key
        connection.close()
        return cls(served, bundle, devices, plan_key)

    async def plan(self, *, after: int) -> wire.SignedPlan:
        """The plan of the first round after ``after``, once there is one."""
        device, status, answer = self._devices[0], 204, b""
        connection = await Connection.open(self._served.url)
        while status == 204:
            target = resources.plan_target(TASK, after=after, wait_s=_PLAN_WAIT_S)
            empty = hashlib.sha256(b"").hexdigest()
            status, answer = await connection.ask(
                "GET", target, authorization=device.authorization("GET", target, empty)
            )
        connection.close()
        return wire.open_plan(_good((status, answer), "plan"), self._plan_key)

    def parcels(self, signed: wire.SignedPlan) -> list[Parcel]:
        """An update of every device to a plan."""
        layout = plan_layout(self._bundle, signed.plan)
        values = np.random.default_rng(signed.plan.round).normal(scale=0.01, size=layout.count).astype(np.float32)
        frame = wire.encode_update(wire.Update(values, 10, wire.LocalMetrics()), signed_plan=signed, layout=layout)
        return [self._parcel(device, signed, frame) for device in self._devices]

    def _parcel(self, device: LoadDevice, signed: wire.SignedPlan, frame: bytes) -> Parcel:
        context = wire.EnvelopeContext.of(signed, device.name)
        sealed = wire.seal(frame, round_key=signed.plan.round_key, context=context)
        target = resources.update_path(TASK, signed.plan.round, device.name)
        return Parcel(device, target, sealed, hashlib.sha256(sealed).hexdigest())

    async def send(
        self, parcels: Sequence[Parcel], *, connections: int, on_sent: Callable[[int], None] = lambda _: None
    ) -> list[float]:
        """Send all of them over so many connections at once; seconds of each from its first byte to its receipt.

        ``on_sent`` is told how many have been counted so far.

        Raises:
            UnavailableError: one was refused.
        """
        waiting, taken = iter(parcels), list[float]()

        async def work(connection: Connection) -> None:
            for parcel in waiting:
                header = parcel.device.authorization("PUT", parcel.target, parcel.digest)
                began = time.perf_counter()
                answer = await connection.ask("PUT", parcel.target, parcel.sealed, header)
                taken.append(time.perf_counter() - began)
                _good(answer, parcel.target)
                on_sent(len(taken))

        lines = [await Connection.open(self._served.url) for _ in range(connections)]
        try:
            await asyncio.gather(*map(work, lines))
        finally:
            for line in lines:
                line.close()
        return taken


def _good(answer: tuple[int, bytes], what: str) -> bytes:
    status, body = answer
    if status >= 300:
        raise UnavailableError(f"load: {what}: {wire.decode_problem(body, status=status)}")
    return body
