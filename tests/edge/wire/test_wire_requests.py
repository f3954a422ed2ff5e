"""A request is its sender's, fresh, and means one thing."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import (
    RequestFormatError,
    SignatureError,
    SignedRequest,
    authorization,
    check_name,
    parse_authorization,
    verify_request,
)
from edge_runtime.wire.requests import EMPTY_BODY, MAX_CLOCK_SKEW_S

NOW = 1_800_000_000.0
NAMES = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", fullmatch=True)
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)


class Nonces:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.known: set[tuple[str, str]] = set()

    def __call__(self, request: SignedRequest) -> bool:
        key = (request.device, request.nonce)
        was_known = key in self.known
        self.known.add(key)
        return was_known


def test_empty_body() -> None:
    assert hashlib.sha256(b"").hexdigest() == EMPTY_BODY


@given(
    st.builds(
        SignedRequest,
        device=NAMES,
        method=st.sampled_from(["GET", "PUT", "POST", "DELETE"]),
        target=st.from_regex(r"/[!-~]{0,80}", fullmatch=True),
        body_digest=HEX,
        time=st.integers(0, 10**12 - 1),
        nonce=HEX.map(lambda text: text[:32]),
    )
)
def test_round_trip(signing_key: Ed25519PrivateKey, request: SignedRequest) -> None:
    header = authorization(request, signing_key)
    parsed, signature = parse_authorization(header, method=request.method, target=request.target)
    assert parsed == request
    verify_request(parsed, signature, key=signing_key.public_key(), now=request.time, seen=lambda _: False)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("EmberLoRA", "Bearer"),
        ("EmberLoRA", "emberlora"),
        ("EmberLoRA ", "EmberLoRA  "),
        ('"pi-4"', '""'),
        ('"pi-4"', '"PI-4"'),
        ('"pi-4"', '"pi\n4"'),
        ('"pi-4"', '"../etc"'),
        ('"pi-4"', '"\udc80"'),
        ('"pi-4"', f'"{"a" * 64}"'),
        ("1800000000", "-1"),
        ("1800000000", "01800000000"),
        ("1800000000", "1800000000.0"),
        ("1800000000", "١٨٠٠٠٠٠٠٠٠"),  # digits to Python, not to us
        ("1800000000", "1" * 13),
        ('nonce="00', 'nonce="0'),
        ('nonce="00', 'nonce="AA'),
        ('body="2d', 'body="'),
        ('=="', '="'),
        ('=="', 'AA"'),
        ("Pv8o", "P=8o"),
        ("Pv8o", "P-8o"),
        (", ", ","),
        (" time", "\ttime"),
        ('=="', '=="\n'),
        ('=="', '==", extra="1"'),
    ],
)
def test_malformed_header(signing_key: Ed25519PrivateKey, request_: SignedRequest, old: str, new: str) -> None:
    header = authorization(request_, signing_key)
    assert old in header
    with pytest.raises(RequestFormatError):
        parse_authorization(header.replace(old, new, 1), method="PUT", target=request_.target)


@pytest.mark.parametrize("header", ["", "EmberLoRA", "Basic QTpC", "EmberLoRA " + "x" * 100_000])
def test_missing_or_foreign_header(header: str) -> None:
    with pytest.raises(RequestFormatError, match="Authorization header is missing or malformed"):
        parse_authorization(header, method="GET", target="/v1/health")


@pytest.mark.parametrize("target", ["", "v1", "/a b", "/a\nb", "/\u00e9", "/\udc80", "http://host/"])
def test_decoded_target_is_refused(signing_key: Ed25519PrivateKey, request_: SignedRequest, target: str) -> None:
    """A line break in a target would let one signature fit two requests; a lone surrogate cannot be encoded."""
    with pytest.raises(RequestFormatError, match="target"):
        parse_authorization(authorization(request_, signing_key), method="PUT", target=target)


def test_every_part_is_signed(signing_key: Ed25519PrivateKey, request_: SignedRequest) -> None:
    signature = signing_key.sign(request_.text())
    changes: dict[str, object] = {
        "device": "pi-5",
        "method": "GET",
        "target": request_.target + "?",
        "body_digest": EMPTY_BODY,
        "time": request_.time + 1,
        "nonce": "f" * 32,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(SignedRequest)}
    nonces = Nonces()
    for name, value in changes.items():
        forged = dataclasses.replace(request_, **{name: value})  # type: ignore[arg-type]  # a table of changes
        with pytest.raises(SignatureError, match="does not match its key"):
            verify_request(forged, signature, key=signing_key.public_key(), now=NOW, seen=nonces)
    assert not nonces.known, "an unverified nonce must not be remembered"


@pytest.mark.parametrize("signature", [b"", bytes(63), bytes(64), bytes(65), b"\xff" * 64])
def test_other_signature(signing_key: Ed25519PrivateKey, request_: SignedRequest, signature: bytes) -> None:
    with pytest.raises(SignatureError, match="does not match"):
        verify_request(request_, signature, key=signing_key.public_key(), now=NOW, seen=Nonces())


def test_clock_skew(signing_key: Ed25519PrivateKey, request_: SignedRequest) -> None:
    signature, nonces = signing_key.sign(request_.text()), Nonces()
    for now, message in ((NOW + MAX_CLOCK_SKEW_S + 1, "-301 s off"), (NOW - MAX_CLOCK_SKEW_S - 1, r"\+301 s off")):
        with pytest.raises(SignatureError, match=message):
            verify_request(request_, signature, key=signing_key.public_key(), now=now, seen=nonces)
    assert not nonces.known
    verify_request(request_, signature, key=signing_key.public_key(), now=NOW + MAX_CLOCK_SKEW_S, seen=nonces)


def test_replayed_nonce(signing_key: Ed25519PrivateKey, request_: SignedRequest) -> None:
    signature, nonces = signing_key.sign(request_.text()), Nonces()
    verify_request(request_, signature, key=signing_key.public_key(), now=NOW, seen=nonces)
    with pytest.raises(SignatureError, match="nonce was used before"):
        verify_request(request_, signature, key=signing_key.public_key(), now=NOW, seen=nonces)


@pytest.mark.parametrize("name", ["a", "0", "pi-4", "a.b_c-d", "a..b", "x" * 63])
def test_good_name(name: str) -> None:
    assert check_name(name, what="device") == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", "a-", "_a", "a.", "A", "ä", "a b", "a/b", "a\n", "a\0", "²", "x" * 64, "x" * 10**6]
)
def test_bad_name(name: str) -> None:
    with pytest.raises(RequestFormatError, match="expected 1 to 63") as caught:
        check_name(name, what="device")
    assert len(str(caught.value)) < 300
