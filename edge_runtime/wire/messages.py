"""The small JSON messages besides plans: enrolment and the operator's commands."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from edge_runtime.wire.errors import RequestFormatError

MAX_MESSAGE_BYTES = 64 << 10
OPERATOR = "operator"  # the name that signs operator requests; no device may have it
_TOKEN_PREFIX = "ember1"
T = TypeVar("T", bound=msgspec.Struct)


class Enrolment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device asks to be known: POST /v1/enrolments."""

    token: str  # the secret part of the token, hex
    device: str
    signing_key: str  # Ed25519 public key, hex


class Enrolled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer: the task and the key that signs its plans (its fingerprint was in the token)."""

    device: str
    task: str
    plan_key: str  # Ed25519 public key, hex


class TokenRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The operator asks for an enrolment token: POST /v1/operator/tokens."""

    device: str
    ttl_s: int


class TokenAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The token to hand to the device."""

    device: str
    token: str
    expires: float  # Unix time in seconds


class UpdateReceipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to an update; a second identical upload gets the same one."""

    device: str
    round: int
    digest: str  # SHA-256 of the sealed bytes, hex
    weight: int  # as counted, after the cap


class DeviceStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device as the operator sees it."""

    name: str
    enrolled: float  # Unix time in seconds
    last_seen: float | None
    left: bool
    updates: int  # counted in applied rounds
    bytes_up: int
    bytes_down: int
    peak_private_mb: float | None = None
    peak_total_mb: float | None = None
    train_s: float | None = None  # of its last update


class RoundStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One finished round. ``metric`` and losses belong to the adapter the round *started* from."""

    round: int
    devices: int
    weight: int
    loss_start: float | None
    loss_end: float | None
    metric: float | None  # classify: accuracy from 0 to 1; lm: mean next-token loss in nats
    eval_examples: int
    bytes_up: int
    seconds: float
    adapter: str  # digest of the adapter it produced


class TaskStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GET /v1/operator/status."""

    task: str
    state: str  # "training" or "finished"
    round: int
    rounds: int
    metric: str  # "accuracy" or "loss"
    received: int  # updates counted in the open round
    wanted: int
    deadline: float
    adapter: str
    bytes_up: int  # sealed updates
    bytes_down: int  # plans, bundles and adapters, all devices
    devices: tuple[DeviceStatus, ...] = ()
    history: tuple[RoundStatus, ...] = ()


@dataclass(frozen=True)
class Token:
    """An enrolment token: 128 random bits and the SHA-256 of the key that will sign the plans, both hex.

    The fingerprint comes to the device by the operator's hand, so the device need not trust the network for it.
    """

    secret: str
    fingerprint: str

    def __str__(self) -> str:
        packed = base64.urlsafe_b64encode(bytes.fromhex(self.secret + self.fingerprint)).decode().rstrip("=")
        return f"{_TOKEN_PREFIX}.{packed}"

    def __repr__(self) -> str:
        return "Token(…)"  # a token is a secret until it is used

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read a token as printed by ``emberlora cloud token``.

        Raises:
            RequestFormatError: it is not one.
        """
        prefix, _, packed = text.strip().partition(".")
        try:
            raw = base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4))
        except (binascii.Error, ValueError) as error:
            raise RequestFormatError("token: not an EmberLoRA token: expected 'ember1.…'") from error
        if prefix != _TOKEN_PREFIX or len(raw) != 48:
            raise RequestFormatError("token: not an EmberLoRA token: expected 'ember1.' and 64 characters")
        return cls(raw[:16].hex(), raw[16:].hex())


def encode_message(message: msgspec.Struct) -> bytes:
    """A message as JSON."""
    return msgspec.json.encode(message)


def decode_message(data: bytes, kind: type[T]) -> T:
    """Read a message strictly.

    Raises:
        RequestFormatError: too long, not JSON, wrong or unknown fields.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise RequestFormatError(f"message: longer than {MAX_MESSAGE_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestFormatError(f"message: not a {kind.__name__}: {error}") from error
