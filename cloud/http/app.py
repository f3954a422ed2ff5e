"""The resources of :mod:`edge_runtime.wire.resources` as an aiohttp application."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.web_request import BaseRequest

from cloud import events
from cloud.http.parts import Part, PartsDesk
from cloud.http.problems import problem_middleware
from cloud.http.signed import Gate, body_length, check_no_body, read_body
from cloud.service import Aggregator
from edge_runtime import wire
from edge_runtime.wire import resources
from edge_runtime.wire.deflate import DEFLATE
from edge_runtime.wire.messages import MAX_MESSAGE_BYTES, OPERATOR
from edge_runtime.wire.patch_frame import PLAIN_VERSION

_JSON = "application/json"
_BINARY = "application/octet-stream"
_NUMBER = re.compile(r"-?[0-9]{1,9}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def make_app(aggregator: Aggregator, *, clock: Callable[[], float], report: events.Report) -> web.Application:
    """The application. Run it with ``auto_decompress=False``: a compressed body must not be unpacked."""
    app = web.Application(middlewares=[problem_middleware(report)])
    handlers = _Resources(aggregator, clock)
    app.add_routes(
        [
            web.get(resources.HEALTH, handlers.health),
            web.post(resources.ENROLMENTS, handlers.enrol),
            web.delete(resources.DEVICE, handlers.leave),
            web.put(resources.DEVICE_KEY, handlers.rekey),
            web.put(resources.CAPABILITY, handlers.tell),
            web.get(resources.PLAN, handlers.plan),
            web.get(resources.PLAN_KEYS, handlers.plan_keys),
            web.get(resources.BLOB, handlers.blob),
            web.get(resources.PATCH, handlers.patch),
            web.put(resources.UPDATE, handlers.update),
            web.get(resources.UPDATE_PARTS, handlers.progress),
            web.patch(resources.UPDATE_PARTS, handlers.part),
            web.get(resources.OPERATOR_STATUS, handlers.status),
            web.post(resources.OPERATOR_TOKENS, handlers.make_token),
            web.post(resources.OPERATOR_REVOCATIONS, handlers.revoke),
            web.post(resources.OPERATOR_PLAN_KEY, handlers.rotate_plan_key),
            web.post(resources.OPERATOR_STOP, handlers.stop),
        ]
    )
    return app


class _Resources:
    def __init__(self, aggregator: Aggregator, clock: Callable[[], float]) -> None:
        server = aggregator.config.server
        self._aggregator = aggregator
        self._members = aggregator.members
        self._parts = PartsDesk(aggregator)
        self._gate = Gate(self._members.key_of, clock)
        self._clock = clock
        self._timeout_s = server.request_timeout_s
        self._slots = asyncio.Semaphore(server.max_uploads_at_once)

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response(body=b'{"status":"ok"}', content_type=_JSON)

    async def enrol(self, request: web.Request) -> web.Response:
        body = await read_body(request, limit=MAX_MESSAGE_BYTES, timeout_s=self._timeout_s)
        enrolment = wire.decode_message(body, wire.Enrolment)
        enrolled = await self._members.enrol(enrolment, task=self._aggregator.config.task.name)
        return _message(enrolled, status=201)

    async def leave(self, request: web.Request) -> web.Response:
        caller = self._gate.caller(request)
        check_no_body(request, caller)
        device = request.match_info["device"]
        if caller.device not in (device, OPERATOR):
            raise wire.NotPermittedError(f"device {device}: may leave by itself or be sent away by the operator")
        await self._members.leave(device, by=caller.device)
        return web.Response(status=204)

    async def rekey(self, request: web.Request) -> web.Response:
        caller = self._device(request)
        device = request.match_info["device"]
        if device != caller.device:
            raise wire.NotPermittedError(f"new key of {device}: signed by {caller.device}")
        body = await read_body(request, limit=MAX_MESSAGE_BYTES, timeout_s=self._timeout_s, digest=caller.body_digest)
        self._members.key_of(device)  # it may have been revoked while the body came
        await self._members.rekey(device, wire.decode_message(body, wire.NewKey))
        return web.Response(status=204)

    async def tell(self, request: web.Request) -> web.Response:
        caller = self._device(request)
        device = request.match_info["device"]
        if device != caller.device:
            raise wire.NotPermittedError(f"capability of {device}: signed by {caller.device}")
        body = await read_body(request, limit=MAX_MESSAGE_BYTES, timeout_s=self._timeout_s, digest=caller.body_digest)
        capability = wire.decode_message(body, wire.Capability)
        await self._aggregator.tell(device, task=request.match_info["task"], capability=capability)
        return web.Response(status=204)

    async def plan(self, request: web.Request) -> web.Response:
        caller = self._device(request)
        check_no_body(request, caller)
        after, wait_s = _whole(request, "after", least=-1), _whole(request, "wait", least=0)
        signed = await self._aggregator.plan_after(
            caller.device,
            task=request.match_info["task"],
            after=after,
            wait_s=min(wait_s, resources.MAX_WAIT_S),
        )
        self._members.key_of(caller.device)  # it may have been revoked while it waited
        if signed is None:
            return web.Response(status=204, headers={"Retry-After": "0"})
        headers = {wire.PLAN_ANSWER: self._aggregator.keyring.prove(signed, caller), hdrs.VARY: hdrs.ACCEPT_ENCODING}
        body = signed.data
        if request.headers.get(hdrs.ACCEPT_ENCODING) == DEFLATE:  # what devices ask for; others are sent it plain
            headers[hdrs.CONTENT_ENCODING], body = DEFLATE, signed.deflated
        self._members.saw(caller.device, sent_bytes=len(body))
        return web.Response(body=body, content_type=_BINARY, headers=headers)

    async def plan_keys(self, request: web.Request) -> web.Response:
        check_no_body(request, self._device(request))
        self._aggregator.check_task(request.match_info["task"])
        return _message(self._aggregator.keyring.chain)

    async def blob(self, request: web.Request) -> web.StreamResponse:
        caller = self._device(request)
        check_no_body(request, caller)
        path = self._aggregator.blob_path(request.match_info["digest"])
        return _CountedFile(path, lambda sent: self._members.saw(caller.device, sent_bytes=sent))

    async def patch(self, request: web.Request) -> web.Response:
        caller = self._device(request)
        check_no_body(request, caller)
        data = await self._aggregator.patch(
            caller.device,
            task=request.match_info["task"],
            round_=_round(request),
            since=_whole(request, "since", least=-1),
            reads=_whole(request, "reads", least=1, default=PLAIN_VERSION),
        )
        return web.Response(body=data, content_type=_BINARY)

    async def update(self, request: web.Request) -> web.Response:
        caller = self._device(request)
        with self._refusals_noted(caller.device):
            return await self._take_update(request, caller)

    @contextlib.contextmanager
    def _refusals_noted(self, device: str) -> Iterator[None]:
        try:
            yield
        except wire.WireError as error:
            self._members.refused(device, wire.problem_for(error).name)
            raise

    async def _take_update(self, request: web.Request, caller: wire.SignedRequest) -> web.Response:
        device, round_ = _own_update(request, caller), _round(request)
        task = request.match_info["task"]
        answer = await self._aggregator.admit(device, task=task, round_=round_, digest=caller.body_digest)
        if isinstance(answer, wire.UpdateReceipt):
            return _message(answer, status=200)
        length = body_length(request)
        if length not in answer:
            expected = " or ".join(map(str, answer))
            raise wire.UpdateFormatError(
                f"update of {device} for round {round_}: length: expected {expected} bytes, got {length}"
            )
        began = self._clock()
        async with self._slots:
            sealed = await read_body(request, limit=length, timeout_s=self._timeout_s, digest=caller.body_digest)
            seconds = self._clock() - began
            self._members.key_of(device)  # it may have been revoked while the body came
            receipt, new = await self._aggregator.submit(
                device, round_=round_, digest=caller.body_digest, sealed=sealed
            )
        if new:
            self._members.arrived(device, round_, seconds)
        return _message(receipt, status=201 if new else 200)

    async def progress(self, request: web.Request) -> web.Response:
        caller = self._device(request)
        check_no_body(request, caller)
        device, digest = _own_update(request, caller), _digest(request)
        return _message(
            await self._parts.progress(device, task=request.match_info["task"], round_=_round(request), digest=digest)
        )

    async def part(self, request: web.Request) -> web.Response:
        caller = self._device(request)
        with self._refusals_noted(caller.device):
            return await self._take_part(request, caller)

    async def _take_part(self, request: web.Request, caller: wire.SignedRequest) -> web.Response:
        part = Part(
            _own_update(request, caller),
            request.match_info["task"],
            _round(request),
            _digest(request),
            offset=_whole(request, "offset", least=0),
            of=_whole(request, "of", least=1),
            bytes=body_length(request),
        )

        async def read() -> bytes:
            limit = min(part.bytes, resources.MAX_PART_BYTES)
            data = await read_body(request, limit=limit, timeout_s=self._timeout_s, digest=caller.body_digest)
            self._members.key_of(part.device)  # it may have been revoked while the body came
            return data

        async with self._slots:
            progress, new = await self._parts.take(part, read)
        return _message(progress, status=201 if new else 200)

    async def status(self, request: web.Request) -> web.Response:
        check_no_body(request, self._operator(request))
        return _message(await self._aggregator.status())

    async def make_token(self, request: web.Request) -> web.Response:
        caller = self._operator(request)
        body = await read_body(request, limit=MAX_MESSAGE_BYTES, timeout_s=self._timeout_s, digest=caller.body_digest)
        answer = await self._members.make_token(wire.decode_message(body, wire.TokenRequest))
        return _message(answer, status=201)

    async def revoke(self, request: web.Request) -> web.Response:
        caller = self._operator(request)
        body = await read_body(request, limit=MAX_MESSAGE_BYTES, timeout_s=self._timeout_s, digest=caller.body_digest)
        answer = await self._members.revoke(wire.decode_message(body, wire.Revocation))
        return _message(answer, status=200 if answer.already else 201)

    async def rotate_plan_key(self, request: web.Request) -> web.Response:
        check_no_body(request, self._operator(request))
        answer = await self._aggregator.rotate_plan_key()
        return _message(answer, status=200 if answer.already else 201)

    async def stop(self, request: web.Request) -> web.Response:
        check_no_body(request, self._operator(request))
        await self._aggregator.stop()
        return _message(await self._aggregator.status())

    def _device(self, request: web.Request) -> wire.SignedRequest:
        caller = self._gate.caller(request)
        if caller.device == OPERATOR:
            raise wire.NotPermittedError(f"{request.path}: is for devices, not for the operator")
        return caller

    def _operator(self, request: web.Request) -> wire.SignedRequest:
        caller = self._gate.caller(request)
        if caller.device != OPERATOR:
            raise wire.NotPermittedError(f"{request.path}: is for the operator, not for {caller.device}")
        return caller


class _CountedFile(web.FileResponse):
    """A file, or the asked range of it; ``count`` is told the bytes once they have been sent whole."""

    def __init__(self, path: Path, count: Callable[[int], None]) -> None:
        super().__init__(path, headers={"Content-Type": _BINARY})
        self._count = count

    async def prepare(self, request: BaseRequest) -> AbstractStreamWriter | None:
        writer = await super().prepare(request)
        self._count(self.content_length or 0)
        return writer


def _message(
    message: wire.Enrolled
    | wire.UpdateReceipt
    | wire.UpdateProgress
    | wire.TokenAnswer
    | wire.Revoked
    | wire.PlanKeyChain
    | wire.PlanKeyRotation
    | wire.TaskStatus,
    *,
    status: int = 200,
) -> web.Response:
    return web.Response(body=wire.encode_message(message), status=status, content_type=_JSON)


def _own_update(request: web.Request, caller: wire.SignedRequest) -> str:
    """The device of an update's path, which must be who signed."""
    device = request.match_info["device"]
    if device != caller.device:
        raise wire.NotPermittedError(f"update of {device}: signed by {caller.device}")
    return device


def _digest(request: web.Request) -> str:
    text = request.match_info["digest"]
    if not _DIGEST.fullmatch(text):
        raise wire.RequestFormatError(f"request: digest: expected 64 hex digits, got {text[:80]!r}")
    return text


def _whole(request: web.Request, name: str, *, least: int, default: int | None = None) -> int:
    text = request.query.get(name, "" if default is None else str(default))
    if not _NUMBER.fullmatch(text) or int(text) < least:
        raise wire.RequestFormatError(f"request: {name}: expected a whole number from {least}, got {text[:20]!r}")
    return int(text)


def _round(request: web.Request) -> int:
    text = request.match_info["round"]
    if not _NUMBER.fullmatch(text):
        raise wire.RequestFormatError(f"request: round: expected a number, got {text[:20]!r}")
    return int(text)
