"""Signed requests: an Ed25519 signature over method, target, body digest, time and nonce.

The shape is that of RFC 9421 with one fixed list of covered components, written as one canonical text. It stands in one
header, ``Authorization: EmberLoRA device="…", time="…", nonce="…", body="sha-256 hex", signature="base64"``.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_runtime.wire.errors import RequestFormatError, SignatureError
from edge_runtime.wire.names import check_name

MAX_CLOCK_SKEW_S = 300
EMPTY_BODY = hashlib.sha256(b"").hexdigest()
_HEADER = re.compile(
    r'EmberLoRA device="([^"]{1,63})", time="(0|[1-9][0-9]{0,11})", nonce="([0-9a-f]{32})", '
    r'body="([0-9a-f]{64})", signature="([A-Za-z0-9+/]{86}==)"'
)
_TARGET = re.compile(r"/[!-~]*")  # as on the request line; a decoded line break or byte would make two texts one


@dataclass(frozen=True)
class SignedRequest:
    """The parts of a request that its signature covers; ``body_digest`` is SHA-256 in hex."""

    device: str
    method: str
    target: str  # path with query, as sent
    body_digest: str
    time: int  # Unix seconds
    nonce: str  # 16 random bytes in hex

    def text(self) -> bytes:
        """The canonical text that is signed."""
        return (
            f"emberlora request 1\n{self.device}\n{self.method}\n{self.target}\n{self.body_digest}\n{self.time}\n"
            f"{self.nonce}\n"
        ).encode()


def authorization(request: SignedRequest, key: Ed25519PrivateKey) -> str:
    """The value of the ``Authorization`` header."""
    signature = base64.b64encode(key.sign(request.text())).decode()
    return (
        f'EmberLoRA device="{request.device}", time="{request.time}", nonce="{request.nonce}", '
        f'body="{request.body_digest}", signature="{signature}"'
    )


def parse_authorization(header: str, *, method: str, target: str) -> tuple[SignedRequest, bytes]:
    """The claimed request and its signature, 64 bytes, nothing verified yet.

    Args:
        header: Value of ``Authorization``; empty when there is none.
        method: As on the request line.
        target: Path with query as on the request line, percent signs and all; never a decoded path.

    Raises:
        RequestFormatError: the header is missing or malformed, or the target is not one of a request line.
    """
    match = _HEADER.fullmatch(header)
    if not match:
        raise RequestFormatError("request: the Authorization header is missing or malformed")
    device, time, nonce, body, signature = match.groups()
    check_name(device, what="device")
    if not _TARGET.fullmatch(target):
        raise RequestFormatError(f"request: target {target[:80]!r}: expected a path of visible ASCII characters")
    return SignedRequest(device, method, target, body, int(time), nonce), base64.b64decode(signature)


def verify_request(
    request: SignedRequest,
    signature: bytes,
    *,
    key: Ed25519PublicKey,
    now: float,
    seen: Callable[[SignedRequest], bool],
) -> None:
    """Check signature, age and freshness; the body's digest is checked when the body has been read.

    Args:
        request: The claimed request.
        signature: 64 bytes.
        key: The sender's enrolled key.
        now: The server's Unix time in seconds.
        seen: Remembers a request and says whether its nonce was known already.

    Raises:
        SignatureError: naming which of the checks failed.
    """
    try:
        key.verify(signature, request.text())
    except InvalidSignature as error:
        raise SignatureError(f"request of {request.device}: the signature does not match its key") from error
    if abs(now - request.time) > MAX_CLOCK_SKEW_S:
        raise SignatureError(
            f"request of {request.device}: its clock is {request.time - now:+.0f} s off: expected ±{MAX_CLOCK_SKEW_S} s"
        )
    if seen(request):
        raise SignatureError(f"request of {request.device}: this nonce was used before")
