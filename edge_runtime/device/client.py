"""The device's side of the HTTP resources: one method a resource, nothing decided.

Every request is signed with a fresh nonce. What the server refuses is raised as the wire's own error; whatever is not
an answer of an aggregator (no connection, a cut, a timeout, a proxy's page) is :class:`TransportError`; a server
whose certificate is not to be trusted is ``UntrustedServerError``. Answers are
never decompressed, never followed elsewhere, and read only up to a stated size.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import aiohttp
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from yarl import URL

from edge_runtime.device.errors import RefusedError, TransportError
from edge_runtime.device.host import Host
from edge_runtime.device.records import Identity, Pending
from edge_runtime.device.transport import BlobAnswer, PlanAnswer, Traffic
from edge_runtime.device.trust import tls_failure, tls_of
from edge_runtime.wire import (
    PLAN_ANSWER,
    Capability,
    Enrolled,
    Enrolment,
    NewKey,
    NotFoundError,
    NotNowError,
    PlanKeyChain,
    RequestFormatError,
    SignedRequest,
    UpdateOffsetError,
    UpdateProgress,
    UpdateReceipt,
    WireError,
    authorization,
    decode_message,
    decode_problem,
    encode_message,
)
from edge_runtime.wire.deflate import DEFLATE, ZLIB, inflate
from edge_runtime.wire.messages import MAX_MESSAGE_BYTES
from edge_runtime.wire.plan import MAX_PLAN_BYTES
from edge_runtime.wire.problems import CONTENT_TYPE, ProblemDocument
from edge_runtime.wire.requests import EMPTY_BODY
from edge_runtime.wire.resources import (
    BLOB,
    DEVICE,
    DEVICE_KEY,
    ENROLMENTS,
    PLAN_KEYS,
    capability_path,
    part_target,
    parts_path,
    patch_target,
    plan_target,
    update_path,
)

_CONNECT_S = 15.0
_READ_S = 60.0  # longest silence within an answer
_SLOWEST_UPLOAD = 4 << 10  # bytes per second; slower than this is a stalled link
_PIECE = 64 << 10
PART_BYTES = 256 << 10  # of an update: 2 s at 1 Mbit/s, which is all that a cut costs; a request costs 1 KB
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(?:\d{1,18}|\*)")
T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True)
class Signer:
    """Whose requests these are."""

    device: str
    key: Ed25519PrivateKey

    @classmethod
    def of(cls, identity: Identity) -> Signer:
        """The signer of an enrolled device."""
        return cls(identity.device, identity.signing_key())


@dataclass(frozen=True)
class _Body:
    pieces: AsyncIterator[bytes]
    length: int
    digest: str  # SHA-256, hex


class Client:
    """Implements :class:`edge_runtime.device.transport.Transport` over HTTP. An async context manager; one per process.

    Args:
        server: Origin, "https://host:port".
        host: Clock for request times and entropy for nonces.
        signer: None before enrolment.
        traffic: Counters to go on with.
        tls: Whose certificates are believed; None for plain http.
    """

    def __init__(
        self,
        server: str,
        host: Host,
        *,
        signer: Signer | None = None,
        traffic: Traffic | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._server = server
        self._host = host
        self._signer = signer
        self.traffic = traffic or Traffic()
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def of(cls, identity: Identity, host: Host) -> Client:
        """The client of an enrolled device.

        Raises:
            InputError, CorruptFileError: see :func:`edge_runtime.device.trust.tls_of`.
        """
        return cls(identity.server, host, signer=Signer.of(identity), tls=tls_of(identity))

    async def __aenter__(self) -> Client:
        # A connection is never used twice: it would be stale, as requests are minutes apart.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True, ssl=self._tls or True),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"User-Agent": "EmberLoRA-device", "Accept-Encoding": "identity"},
            middlewares=(send_once,),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def enrol(self, enrolment: Enrolment) -> Enrolled:
        """Ask to be known; not signed, the token speaks for it.

        Raises:
            TokenError, RequestError: the server's refusal.
            TransportError: no answer; asking again with the same key and token is safe.
        """
        data = encode_message(enrolment)
        body = _Body(_whole(data), len(data), "")
        async with self._answer("POST", ENROLMENTS, body=body) as response:
            return await self._message(response, Enrolled)

    async def leave(self) -> None:
        """Make the server forget this device.

        Raises:
            RequestError: the server's refusal, ``UnknownDeviceError`` when it has forgotten already.
            TransportError: no answer.
        """
        async with self._answer("DELETE", DEVICE.format(device=self._signed_by().device)):
            pass

    async def plan(self, task: str, *, after: int, wait_s: int) -> PlanAnswer:
        """Wait at the server, at most ``wait_s`` seconds, for the first plan of a round after ``after``.

        Raises:
            RequestError, RoundError: the server's refusal.
            TransportError: no answer.
        """
        target = plan_target(task, after=after, wait_s=wait_s)
        asked = self._request("GET", target, EMPTY_BODY)
        deflated = {"Accept-Encoding": DEFLATE}
        async with self._answer("GET", target, asked=asked, headers=deflated, read_s=wait_s + _READ_S) as response:
            if response.status == 204:
                return PlanAnswer(None, _seconds(response.headers.get("Retry-After")))
            proof = response.headers.get(PLAN_ANSWER)
            data = await self._capped(response, MAX_PLAN_BYTES)
            if response.headers.get("Content-Encoding") == DEFLATE:
                data = self._inflated(data)
            return PlanAnswer(data, request=asked, proof=proof)

    async def plan_keys(self, task: str) -> PlanKeyChain:
        """Every change of the key that signs plans, nothing checked.

        Raises:
            NotFoundError, RequestError: the server's refusal; one from before this resource knows no such path.
            TransportError: no answer.
        """
        async with self._answer("GET", PLAN_KEYS.format(task=task)) as response:
            return await self._message(response, PlanKeyChain)

    @contextlib.asynccontextmanager
    async def blob(self, digest: str, *, offset: int) -> AsyncIterator[BlobAnswer]:
        """Open a blob from byte ``offset`` on; the server may answer from the beginning instead.

        Raises:
            NotFoundError, RequestError: the server's refusal.
            TransportError: no answer, or cut, also while the pieces are read.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self._timed("GET", BLOB.format(digest=digest), headers=headers) as response:
            if response.status == 416:  # nothing after offset: what is here is all there is
                yield BlobAnswer(offset, _whole(b""))
            else:
                yield BlobAnswer(_start(response), self._pieces(response))

    @contextlib.asynccontextmanager
    async def patch(self, task: str, round_: int, *, since: int) -> AsyncIterator[AsyncIterator[bytes]]:
        """Open the patch from the adapter of round ``since`` (-1: the bundle's) to that of ``round_``.

        Raises:
            NotFoundError, RoundError, RequestError: the server's refusal.
            TransportError: no answer, or cut, also while the pieces are read.
        """
        async with self._timed("GET", patch_target(task, round_, since=since)) as response:
            yield self._pieces(response)

    async def upload(self, pending: Pending, sealed: bytes) -> UpdateReceipt:
        """Send a sealed update, a large one in parts: what the server has of it is not sent again.

        Raises:
            UpdateError, RoundError, RequestError: the server's refusal.
            RefusedError: the receipt is for another update.
            TransportError: no answer; sending the same bytes again is safe.
        """
        receipt = None
        if pending.bytes > PART_BYTES:
            # A server from before parts knows no such path; whatever else it is, it says it again.
            with contextlib.suppress(NotFoundError):
                receipt = await self._upload_parts(pending, sealed)
        if receipt is None:
            receipt = await self._upload_whole(pending, sealed)
        if (receipt.round, receipt.digest) != (pending.round, pending.digest):
            raise RefusedError(
                f"receipt: expected round {pending.round} and digest {pending.digest[:12]}, "
                f"got {receipt.round} and {receipt.digest[:12]}"
            )
        return receipt

    async def _upload_whole(self, pending: Pending, sealed: bytes) -> UpdateReceipt:
        target = update_path(pending.task, pending.round, self._signed_by().device)
        body = _Body(self._sent(sealed), pending.bytes, pending.digest)
        began = self._host.clock()
        async with self._answer("PUT", target, body=body) as response:
            receipt = await self._message(response, UpdateReceipt)
        self.traffic.pace_up.add(pending.bytes, self._host.clock() - began)
        return receipt

    async def _upload_parts(self, pending: Pending, sealed: bytes) -> UpdateReceipt:
        path = parts_path(pending.task, pending.round, self._signed_by().device, pending.digest)
        async with self._answer("GET", path) as response:
            progress = await self._message(response, UpdateProgress)
        first = progress.received
        try:
            while progress.receipt is None:
                part = sealed[progress.received : progress.received + PART_BYTES]
                progress = await self._send_part(path, part, offset=progress.received, of=pending.bytes)
        except UpdateOffsetError as error:  # an earlier request was still being answered when the offset was asked for
            raise TransportError(f"{self._server}: {error}", progress=True) from error
        except TransportError as error:
            error.progress = error.progress or progress.received > first
            raise
        return progress.receipt

    async def _send_part(self, path: str, part: bytes, *, offset: int, of: int) -> UpdateProgress:
        body = _Body(self._sent(part), len(part), hashlib.sha256(part).hexdigest())
        began = self._host.clock()
        async with self._answer("PATCH", part_target(path, offset=offset, of=of), body=body) as response:
            progress = await self._message(response, UpdateProgress)
        self.traffic.pace_up.add(len(part), self._host.clock() - began)
        there = offset + len(part)
        if progress.receipt is None and (progress.received != there or there >= of):
            expected = "a receipt" if there >= of else f"{there} bytes to be there"
            raise RefusedError(f"part of an update: expected {expected}, got {progress.received} bytes of {of}")
        return progress

    async def tell(self, task: str, capability: Capability) -> None:
        """Say what this device measured of itself.

        Raises:
            NotFoundError, RequestError: the server's refusal; one from before this resource knows no such path.
            TransportError: no answer.
        """
        data = encode_message(capability)
        body = _Body(_whole(data), len(data), hashlib.sha256(data).hexdigest())
        async with self._answer("PUT", capability_path(task, self._signed_by().device), body=body):
            pass

    async def rekey(self, message: NewKey) -> None:
        """Name the key that counts from now on.

        Raises:
            SignatureError: this client's key is not the one the server knows.
            NotFoundError, RequestError: the server's refusal; one from before this resource knows no such path.
            TransportError: no answer; the server may have the new key or not.
        """
        data = encode_message(message)
        body = _Body(_whole(data), len(data), hashlib.sha256(data).hexdigest())
        async with self._answer("PUT", DEVICE_KEY.format(device=self._signed_by().device), body=body):
            pass

    def _signed_by(self) -> Signer:
        if self._signer is None:
            raise ValueError("this client has no signer: a fault of the caller")
        return self._signer

    @contextlib.asynccontextmanager
    async def _answer(
        self,
        method: str,
        target: str,
        *,
        body: _Body | None = None,
        headers: dict[str, str] | None = None,
        asked: SignedRequest | None = None,
        read_s: float = _READ_S,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one request and give its answer, refusals raised. Writing to disk inside may raise OSError as it is.

        ``asked`` is what is signed, where the caller has to know it.
        """
        if self._session is None:
            raise ValueError("this client is not open: a fault of the caller")
        sent = dict(headers or {})
        if body is not None:
            sent |= {"Content-Length": str(body.length), "Content-Type": "application/octet-stream"}
        if self._signer is not None:
            asked = asked or self._request(method, target, EMPTY_BODY if body is None else body.digest)
            sent["Authorization"] = authorization(asked, self._signer.key)
        try:
            async with self._session.request(
                method,
                URL(self._server + target, encoded=True),  # sent exactly as signed
                data=None if body is None else body.pieces,
                headers=sent,
                timeout=_timeout(read_s, body),
                allow_redirects=False,
            ) as response:
                if response.status not in (200, 201, 204, 206, 416):
                    raise await self._refusal(response)
                yield response
        except aiohttp.ClientConnectorCertificateError as error:
            raise tls_failure(self._server, error.certificate_error) from error
        except aiohttp.ClientSSLError as error:
            raise tls_failure(self._server, error.os_error) from error
        except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as error:
            raise TransportError(f"{self._server}: {_describe(error)}") from error

    @contextlib.asynccontextmanager
    async def _timed(
        self, method: str, target: str, *, headers: dict[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """As :meth:`_answer`, for a body that is received; notes when it began and how fast it came."""
        clock, before = self._host.clock, self.traffic.down
        began = clock()
        async with self._answer(method, target, headers=headers) as response:
            self.traffic.answered(clock() - began)
            yield response
        self.traffic.pace_down.add(self.traffic.down - before, clock() - began)

    def _request(self, method: str, target: str, body_digest: str) -> SignedRequest:
        nonce = self._host.entropy(16).hex()
        return SignedRequest(self._signed_by().device, method, target, body_digest, int(self._host.clock()), nonce)

    async def _refusal(self, response: aiohttp.ClientResponse) -> WireError | TransportError:
        body = await self._capped(response, MAX_MESSAGE_BYTES)
        hint = _seconds(response.headers.get("Retry-After"))
        if response.content_type != CONTENT_TYPE:
            text = " ".join(body[:120].decode("utf-8", "replace").split())
            return TransportError(
                f"{self._server}: answered {response.status}, and not as an aggregator does: {text}", retry_after_s=hint
            )
        error = decode_problem(body, status=response.status)
        if not isinstance(error, NotNowError):
            return error
        return TransportError(f"{self._server}: {error}", retry_after_s=_problem_hint(body) or hint)

    async def _message(self, response: aiohttp.ClientResponse, kind: type[T]) -> T:
        try:
            return decode_message(await self._capped(response, MAX_MESSAGE_BYTES), kind)
        except RequestFormatError as error:  # some gateway's page with status 200
            raise TransportError(f"{self._server}: answered with no {kind.__name__}: {error}") from error

    async def _capped(self, response: aiohttp.ClientResponse, most: int) -> bytes:
        """The answer's body; of a longer one ``most`` + 1 bytes, which every reader refuses."""
        data = bytearray()
        async for piece in self._pieces(response):
            data += piece
            if len(data) > most:
                break
        return bytes(data[: most + 1])

    def _inflated(self, data: bytes) -> bytes:
        """A plan out of its stream; of one that is too long a byte more than a plan may have, which is refused."""
        try:
            return inflate(data, ZLIB, most=MAX_PLAN_BYTES)
        except ValueError as error:
            raise TransportError(f"{self._server}: answered with no plan: {error}") from error

    async def _pieces(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        async for piece in response.content.iter_chunked(_PIECE):
            self.traffic.down += len(piece)
            yield piece

    async def _sent(self, data: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self.traffic.up += len(piece)
            yield piece


async def send_once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Send a request and let a broken connection be told.

    aiohttp would send GET and DELETE again by itself, with the same nonce, which the server must take for a replay: the
    user would read of a signature and not of the connection.
    """
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:  # this one it does not repeat, and certificates are told from it
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(str(error)) from error


async def _whole(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data


def _timeout(read_s: float, body: _Body | None) -> aiohttp.ClientTimeout:
    # While a body is sent nothing is read, so a stalled upload needs a bound of its own.
    total = None if body is None else _READ_S + body.length / _SLOWEST_UPLOAD
    return aiohttp.ClientTimeout(total=total, sock_connect=_CONNECT_S, sock_read=read_s)


def _start(response: aiohttp.ClientResponse) -> int | None:
    if response.status != 206:
        return 0
    match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _seconds(text: str | None) -> float | None:
    """A ``Retry-After`` in seconds; its other form, a date, is not used by aggregators."""
    return float(text) if text is not None and re.fullmatch(r"\d{1,9}(\.\d{1,3})?", text) else None


def _problem_hint(body: bytes) -> float | None:
    try:
        return msgspec.json.decode(body, type=ProblemDocument).retry_after_s
    except msgspec.DecodeError:
        return None


def _describe(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "did not answer in time"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the answer was cut"
    return f"cannot be reached: {error}" if str(error) else f"cannot be reached: {type(error).__name__}"
