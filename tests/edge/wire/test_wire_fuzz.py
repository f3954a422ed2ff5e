"""Whatever the bytes, only the declared errors come out of a parser."""

from __future__ import annotations

import contextlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire import (
    Capability,
    Enrolment,
    EnvelopeContext,
    EnvelopeError,
    Layout,
    PlanFormatError,
    PlanSignatureError,
    RequestFormatError,
    SignedPlan,
    TaskStatus,
    Token,
    Update,
    UpdateError,
    WireError,
    decode_message,
    decode_problem,
    decode_update,
    encode_update,
    open_plan,
    parse_authorization,
    unseal,
)


def mutations(whole: bytes) -> st.SearchStrategy[bytes]:
    """Anything, or ``whole`` with a slice of it replaced by anything."""

    def replaced(start: int, length: int, put: bytes) -> bytes:
        return whole[:start] + put + whole[start + length :]

    some = st.binary(max_size=40)
    return st.binary(max_size=300) | st.builds(replaced, st.integers(0, len(whole)), st.integers(0, 20), some)


@given(data=st.data())
def test_plan(signed: SignedPlan, signing_key: Ed25519PrivateKey, data: st.DataObject) -> None:
    text = data.draw(mutations(signed.data[64:]))
    with contextlib.suppress(PlanFormatError):  # rightly signed, so that the text is read
        open_plan(signing_key.sign(b"emberlora plan 1\0" + text) + text, signing_key.public_key())
    raw = data.draw(mutations(signed.data))
    if raw != signed.data:
        with pytest.raises((PlanFormatError, PlanSignatureError)):
            open_plan(raw, signing_key.public_key())


@given(data=st.data())
def test_update(signed: SignedPlan, layout: Layout, update: Update, data: st.DataObject) -> None:
    frame = encode_update(update, signed_plan=signed, layout=layout)
    with contextlib.suppress(UpdateError):
        decode_update(data.draw(mutations(frame)), signed_plan=signed, layout=layout)


@given(sealed=st.binary(max_size=200))
def test_envelope(sealed: bytes, round_key: X25519PrivateKey, context: EnvelopeContext) -> None:
    with pytest.raises(EnvelopeError):
        unseal(sealed, round_key=round_key, context=context)


@given(header=st.text(max_size=300), target=st.text(max_size=20))
def test_authorization(header: str, target: str) -> None:
    with pytest.raises(RequestFormatError):
        parse_authorization(header, method="GET", target=target)


@given(text=st.text(max_size=80) | st.text(max_size=64).map("ember1.".__add__))
def test_token(text: str) -> None:
    with contextlib.suppress(RequestFormatError):
        Token.parse(text)


@given(
    data=mutations(b'{"token":"00","device":"pi-4","signing_key":"00"}'), kind=st.sampled_from([Enrolment, TaskStatus])
)
def test_message(data: bytes, kind: type[Enrolment | TaskStatus]) -> None:
    with pytest.raises(RequestFormatError):
        decode_message(data, kind)


@given(data=mutations(b'{"machine":"aarch64","cores":4,"memory_mb":9,"available_mb":3,"step_s":1.5}'))
def test_capability(data: bytes) -> None:
    with contextlib.suppress(RequestFormatError):
        decode_message(data, Capability)


@given(body=mutations(b'{"type":"urn:emberlora:problem:token","status":403}'), status=st.integers(100, 599))
def test_problem(body: bytes, status: int) -> None:
    assert isinstance(decode_problem(body, status=status), WireError)
