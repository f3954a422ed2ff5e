"""Sealing an update to the round's key with HPKE (RFC 9180), base mode: X25519, HKDF-SHA256, ChaCha20-Poly1305.

The ``info`` binds an envelope to task, round, plan and device, so that it opens nowhere else. Sealing is randomised: a
device keeps the sealed bytes and sends those again instead of sealing twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from edge_runtime.wire.errors import EnvelopeError, PlanFormatError
from edge_runtime.wire.plan import SignedPlan

OVERHEAD_BYTES = 48  # 32 of encapsulated key, 16 of authentication tag
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


@dataclass(frozen=True)
class EnvelopeContext:
    """What an envelope is bound to."""

    task: str
    round: int
    plan_digest: str
    device: str

    @classmethod
    def of(cls, signed_plan: SignedPlan, device: str) -> EnvelopeContext:
        """The context of ``device``'s update to this plan."""
        return cls(signed_plan.plan.task, signed_plan.plan.round, signed_plan.digest, device)

    def info(self) -> bytes:
        """The HPKE ``info``: one field a line; names cannot hold a line break."""
        return f"emberlora update 1\n{self.task}\n{self.round}\n{self.plan_digest}\n{self.device}\n".encode()


def seal(frame: bytes, *, round_key: str, context: EnvelopeContext) -> bytes:
    """Encrypt a frame to the round's public key (hex).

    Raises:
        PlanFormatError: the plan's round key is no key, or a point that every secret maps to zero.
    """
    try:
        key = X25519PublicKey.from_public_bytes(bytes.fromhex(round_key))
        return _SUITE.encrypt(frame, key, info=context.info())
    except ValueError as error:
        raise PlanFormatError(f"plan: round {context.round}: its round key is no usable X25519 key") from error


def unseal(sealed: bytes, *, round_key: X25519PrivateKey, context: EnvelopeContext) -> bytes:
    """Decrypt an envelope.

    Raises:
        EnvelopeError: it was sealed to another key or for another context, or its bytes were changed.
    """
    try:
        return _SUITE.decrypt(sealed, round_key, info=context.info())
    except (InvalidTag, ValueError) as error:
        raise EnvelopeError(
            f"update of {context.device} for round {context.round}: cannot be opened: it was sealed for another round, "
            "plan or device, or changed on the way"
        ) from error
