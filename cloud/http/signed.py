"""Who sent a request and what its body is: signature first, then the length, then the bytes, each before the next."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_runtime import wire
from edge_runtime.wire.requests import EMPTY_BODY, MAX_CLOCK_SKEW_S

_SLICE_S = 60


class NonceMemory:
    """Nonces of verified requests, for as long as their time stamp passes and a little longer, in this process.

    What is kept of one is 60 bits of a hash: 90 bytes, and all that a request leaves behind. Where two fall together
    (with a full memory, one in 10^12), a device has one request refused; nobody can bring that about, as nobody knows
    another's next nonce. They lie in slices by the minute until which they pass, so that old ones go all at once.

    Only enrolled devices can fill it. One that does so is held back alone: the others, and the operator, have room.
    """

    def __init__(self, clock: Callable[[], float], *, capacity: int = 200_000, per_device: int = 5_000) -> None:
        """``capacity`` nonces take about 18 MB. ``per_device`` of them are twelve requests a second all the time."""
        self._clock = clock
        self._capacity = capacity
        self._per_device = per_device
        self._slices: dict[int, _Slice] = {}

    def seen(self, request: wire.SignedRequest) -> bool:
        """Remember a request's nonce and say whether it was known.

        Args:
            request: Its time stamp has been found to pass.

        Raises:
            RateLimitedError: the device has sent too many requests in a few minutes to remember another.
            UnavailableError: all of them together have.
        """
        self._forget(self._clock())
        digest = hashlib.blake2b(f"{request.device}\n{request.nonce}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "big") >> 4  # an int of 60 bits is the smallest object that tells so many apart
        slices = self._slices.values()
        if any(key in one.nonces for one in slices):
            return True
        if sum(one.held[request.device] for one in slices) >= self._per_device:
            raise wire.RateLimitedError(
                f"device {request.device}: expected at most {self._per_device} requests in "
                f"{(MAX_CLOCK_SKEW_S + _SLICE_S) // 60} minutes"
            )
        if sum(len(one.nonces) for one in slices) >= self._capacity:
            raise wire.UnavailableError("too many requests; try again later")
        passes_until = request.time + MAX_CLOCK_SKEW_S
        now_in = self._slices.setdefault(passes_until // _SLICE_S, _Slice())
        now_in.nonces[key] = None
        now_in.held[request.device] += 1
        return False

    def _forget(self, now: float) -> None:
        """A slice more than need be is kept, for a clock that is set back a little."""
        for number in [number for number in self._slices if (number + 2) * _SLICE_S <= now]:
            del self._slices[number]


@dataclass(frozen=True)
class _Slice:
    """What passes until the same minute."""

    nonces: dict[int, None] = field(default_factory=dict)  # smaller than a set of as many
    held: Counter[str] = field(default_factory=Counter)  # nonces by device


class Gate:
    """Checks signatures."""

    def __init__(self, key_of: Callable[[str], Ed25519PublicKey], clock: Callable[[], float]) -> None:
        self._key_of = key_of
        self._clock = clock
        self._nonces = NonceMemory(clock)

    def caller(self, request: web.Request) -> wire.SignedRequest:
        """The verified head of a request; its body must still be held against ``body_digest``.

        Raises:
            RequestFormatError, UnknownDeviceError, DeviceRevokedError, SignatureError: why it is refused.
        """
        header = request.headers.get("Authorization", "")
        claimed, signature = wire.parse_authorization(header, method=request.method, target=request.raw_path)
        key = self._key_of(claimed.device)
        wire.verify_request(claimed, signature, key=key, now=self._clock(), seen=self._nonces.seen)
        return claimed


def check_no_body(request: web.Request, caller: wire.SignedRequest) -> None:
    """Demand that a request has no body and signs none.

    Raises:
        RequestFormatError: it has one.
        UpdateDigestError: it signed one.
    """
    if request.can_read_body:
        raise wire.RequestFormatError(f"request of {caller.device}: no body expected")
    if caller.body_digest != EMPTY_BODY:
        raise wire.UpdateDigestError(f"request of {caller.device}: the body is not the one that was signed")


def body_length(request: web.Request) -> int:
    """The announced length of a body, known before a byte of it is read.

    Raises:
        RequestFormatError: no length, or a compressed body.
    """
    if "Content-Encoding" in request.headers:
        raise wire.RequestFormatError("request: Content-Encoding is not accepted")
    if request.content_length is None:
        raise wire.RequestFormatError("request: Content-Length is missing")
    return request.content_length


async def read_body(request: web.Request, *, limit: int, timeout_s: float, digest: str | None = None) -> bytes:
    """Read a body of known length, hashing it on the way.

    Args:
        request: Its head has been accepted.
        limit: Most bytes taken.
        timeout_s: For the whole body.
        digest: SHA-256 it must have, hex; None when the request is not signed.

    Raises:
        RequestFormatError: no length, a compressed body, or one that ended early.
        RequestTooLargeError: over ``limit`` bytes.
        UpdateDigestError: the bytes are not those that were signed.
        UnavailableError: it came too slowly.
    """
    length = body_length(request)
    if length > limit:
        raise wire.RequestTooLargeError(f"request: expected at most {limit} bytes, got {length}")
    try:
        data, found = await asyncio.wait_for(_read(request, length), timeout_s)
    except asyncio.TimeoutError as error:
        raise wire.UnavailableError(
            f"request: the body did not come within {timeout_s:.0f} s; send it again"
        ) from error
    except (web.RequestPayloadError, ConnectionError) as error:
        raise wire.RequestFormatError("request: the body ended early") from error
    if digest is not None and found != digest:
        raise wire.UpdateDigestError(f"request: body: expected digest {digest[:12]}, got {found[:12]}")
    return data


async def _read(request: web.Request, length: int) -> tuple[bytes, str]:
    pieces: list[bytes] = []
    found, count = hashlib.sha256(), 0
    async for piece in request.content.iter_any():  # iter_chunks, which copies less, never ends for an empty body
        count += len(piece)
        if count > length:  # the parser should have stopped; never trust it with memory
            raise wire.RequestTooLargeError(f"request: expected {length} bytes, got more")
        found.update(piece)
        pieces.append(piece)
    return b"".join(pieces), found.hexdigest()
