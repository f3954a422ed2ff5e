"""An envelope opens with the round's key and in its own context only."""

from __future__ import annotations

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from edge_runtime.wire import EnvelopeContext, EnvelopeError, PlanFormatError, seal, unseal
from edge_runtime.wire.envelope import OVERHEAD_BYTES


def public(key: X25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


@pytest.fixture(scope="module")
def sealed(round_key: X25519PrivateKey, context: EnvelopeContext) -> bytes:
    return seal(b"a frame", round_key=public(round_key), context=context)


def test_overhead_is_fixed(round_key: X25519PrivateKey, context: EnvelopeContext) -> None:
    for size in (0, 1, 1000):
        sealed = seal(bytes(size), round_key=public(round_key), context=context)
        assert len(sealed) == size + OVERHEAD_BYTES
        assert unseal(sealed, round_key=round_key, context=context) == bytes(size)


@pytest.mark.parametrize("change", [{"task": "sst3"}, {"round": 8}, {"plan_digest": "00" * 32}, {"device": "pi-5"}])
def test_another_context_does_not_open(
    sealed: bytes, round_key: X25519PrivateKey, context: EnvelopeContext, change: dict[str, object]
) -> None:
    with pytest.raises(EnvelopeError, match="cannot be opened"):
        unseal(sealed, round_key=round_key, context=dataclasses.replace(context, **change))  # type: ignore[arg-type]  # a table of changes


def test_another_key_does_not_open(sealed: bytes, context: EnvelopeContext) -> None:
    with pytest.raises(EnvelopeError):
        unseal(sealed, round_key=X25519PrivateKey.from_private_bytes(bytes(32)), context=context)


def test_every_changed_bit_is_noticed(sealed: bytes, round_key: X25519PrivateKey, context: EnvelopeContext) -> None:
    """All but the top bit of the encapsulated key, which X25519 ignores; the key schedule does not."""
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 0x80
        with pytest.raises(EnvelopeError):
            unseal(bytes(changed), round_key=round_key, context=context)


@pytest.mark.parametrize(
    "sealed", [b"", bytes(1), bytes(31), bytes(32), bytes(47), bytes(48), b"\xff" * 200, b"\x01" + bytes(99)]
)
def test_garbage_does_not_open(sealed: bytes, round_key: X25519PrivateKey, context: EnvelopeContext) -> None:
    with pytest.raises(EnvelopeError):
        unseal(sealed, round_key=round_key, context=context)


@pytest.mark.parametrize("key", ["", "zz", "00", "00" * 32, "01" + "00" * 31, "00" * 33])
def test_unusable_round_key_is_the_plans_fault(context: EnvelopeContext, key: str) -> None:
    """Not hex, another length, or a point of small order: X25519 would yield zero whatever the secret."""
    with pytest.raises(PlanFormatError, match="round 7: its round key"):
        seal(b"a frame", round_key=key, context=context)
