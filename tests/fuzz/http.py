"""Hostile requests to a real aggregator on loopback: bodies that are rightly signed and wrong, and broken HTTP.

Every answer must be one of the protocol: a status that is not a server's fault, and where it refuses what it could
read, a problem of the table by name. Connections that are cut are answered or closed, never kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np

from cloud.planning import plan_layouts
from edge_runtime import wire
from edge_runtime.wire import resources
from edge_runtime.wire.errors import RequestFormatError
from tests.cloud.cloud_fleet import Answer, Device, Site
from tests.fuzz.mutations import mutated

_DEVICE, _TASK, _ROUND = "pi-4", "tiny", 0
_ANSWER_S = 20.0
_RAW_SHARE = 0.2  # of requests that are broken as HTTP; each has a connection of its own
_GOOD_SHARE = 0.1  # of bodies, so that what lies behind the parsers is reached, and again by repeats
_BUSY = (503, 507)  # named, and no fault


@dataclass(frozen=True)
class Resource:
    """A resource that takes a body, who signs, and good bodies for it."""

    method: str
    target: str
    signer: Device | None  # None: nobody
    corpus: tuple[bytes, ...]


class HttpTarget:
    """A server and an enrolled device; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._site = Site.make(folder)
        self._session: aiohttp.ClientSession | None = None
        self.resources: tuple[Resource, ...] = ()

    async def __aenter__(self) -> HttpTarget:
        await self._site.start()
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_ANSWER_S))
        device = await self._site.device(self._session, _DEVICE)
        operator = Device(self._site, self._session, "operator", self._site.operator_key())
        self.resources = await self._all(device, operator)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
        await self._site.close()

    @property
    def url(self) -> str:
        """Of the server."""
        assert self._site.server is not None, "it was started"
        return self._site.server.url

    async def fault(self, rng: random.Random) -> str | None:
        """What is wrong with how the server takes one hostile request; None: nothing."""
        resource = rng.choice(self.resources)
        good = rng.random() < _GOOD_SHARE
        body = rng.choice(resource.corpus) if good else mutated(rng, resource.corpus)
        if rng.random() < _RAW_SHARE:
            return await self._raw_fault(resource, body, rng)
        return await self._body_fault(resource, body)

    async def honest_fault(self) -> str | None:
        """Whether the device is still served after all that."""
        device = self.resources[0].signer
        assert device is not None, "the first resource is a device's"
        plan = await device.plan()
        return None if plan is not None else "no plan for an honest device"

    async def _all(self, device: Device, operator: Device) -> tuple[Resource, ...]:
        signed = await device.plan()
        assert signed is not None, "a new task has a plan"
        count = plan_layouts(self._site.bundle, signed.plan)[0].count
        frame = device.frame(signed, np.ones(count))
        sealed = device.seal(signed, frame)
        parts = resources.parts_path(_TASK, _ROUND, _DEVICE, hashlib.sha256(sealed).hexdigest())
        capability = wire.encode_message(wire.Capability("aarch64", 4, 4096, 2048, step_s=1.5))
        enrolment = wire.encode_message(wire.Enrolment("0f" * 16, "pi-5", "2d" * 32))
        rekeying = wire.encode_message(wire.new_key(_DEVICE, device.key))
        return (
            Resource("PUT", resources.capability_path(_TASK, _DEVICE), device, (capability,)),
            Resource("PUT", resources.update_path(_TASK, _ROUND, _DEVICE), device, (sealed, frame)),
            Resource("PATCH", resources.part_target(parts, offset=0, of=len(sealed)), device, (sealed[:90], sealed)),
            Resource("PUT", resources.DEVICE_KEY.format(device=_DEVICE), device, (rekeying,)),
            Resource("POST", resources.ENROLMENTS, None, (enrolment,)),
            Resource("POST", resources.OPERATOR_TOKENS, operator, (wire.encode_message(wire.TokenRequest("x", 900)),)),
            Resource("POST", resources.OPERATOR_REVOCATIONS, operator, (wire.encode_message(wire.Revocation("x")),)),
        )

    async def _body_fault(self, resource: Resource, body: bytes) -> str | None:
        sender = resource.signer
        headers = {} if sender is None else sender.head(resource.method, resource.target, body)
        sender = sender or self.resources[0].signer
        assert sender is not None, "the first resource is a device's"
        answer = await sender.send(resource.method, resource.target, body, headers)
        wrong = _wrong(answer)
        return wrong and f"{resource.method} {resource.target}: {wrong}: body {body[:400].hex()}"

    async def _raw_fault(self, resource: Resource, body: bytes, rng: random.Random) -> str | None:
        head = self._head(resource, body)
        data = mutated(rng, [head + body, head])
        host, _, port = self.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            async with asyncio.timeout(_ANSWER_S):
                writer.write(data)
                writer.write_eof()
                answer = await reader.read()
        except TimeoutError:
            return f"neither answered nor closed in {_ANSWER_S:g} s: {data.hex()}"
        except ConnectionError:  # it was closed while we wrote
            return None
        finally:
            writer.close()
        return _wrong_status(answer) and f"{_wrong_status(answer)}: {data.hex()}"

    def _head(self, resource: Resource, body: bytes) -> bytes:
        signer = resource.signer
        signed = {} if signer is None else signer.head(resource.method, resource.target, body)
        lines = [f"{resource.method} {resource.target} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in signed.items()]
        return "\r\n".join([*lines, "Connection: close", "", ""]).encode()


def _wrong(answer: Answer) -> str | None:
    """What is wrong with an answer to well-formed HTTP."""
    if answer.status < 400:
        return None
    if answer.status >= 500 and answer.status not in _BUSY:
        return f"answered {answer.status}: {answer.body[:200]!r}"
    error = wire.decode_problem(answer.body, status=answer.status)
    unnamed = isinstance(error, RequestFormatError) and str(error).startswith("the server answered")
    return f"refused without a name: {error}" if unnamed else None


def _wrong_status(answer: bytes) -> str | None:
    """What is wrong with the first answer to what may be no HTTP; nothing at all is right."""
    if not answer:
        return None
    words = answer.split(b" ", 2)
    if len(words) < 3 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return f"answered with what is no HTTP: {answer[:80]!r}"
    status = int(words[1])
    return f"answered {status}" if status >= 500 and status not in _BUSY else None


class _Logged(logging.Handler):
    """Keeps what is logged as an error: nobody outside may make a server do that."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.found.append(f"logged by {record.name}: {record.getMessage()[:200]}: {error!r:.300}")


async def http_faults(folder: Path, seeds: Sequence[int]) -> list[str]:
    """What is wrong with how a new server takes the requests of these seeds, one each."""
    logged = _Logged()
    logging.getLogger().addHandler(logged)
    found = []
    try:
        async with HttpTarget(folder) as target:
            for seed in seeds:
                wrong = await target.fault(random.Random(seed)) or "".join(logged.found[:1])
                logged.found.clear()
                found += [f"seed {seed}: {wrong}"] if wrong else []
            wrong = await target.honest_fault()
            found += [wrong] if wrong else []
    finally:
        logging.getLogger().removeHandler(logged)
    return found + logged.found
