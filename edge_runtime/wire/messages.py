"""The small JSON messages besides plans: enrolment and the operator's commands."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec

from edge_runtime.wire.capability import Capability
from edge_runtime.wire.errors import RequestFormatError
from edge_runtime.wire.names import Hex32, Name

MAX_MESSAGE_BYTES = 64 << 10
MAX_STATUS_BYTES = 16 << 20  # about 500 bytes a device and a round: thousands of each
OPERATOR = "operator"  # the name that signs operator requests; no device may have it
_TOKEN = re.compile(r"ember1\.([A-Za-z0-9_-]{64})")  # 48 bytes in 64 characters, no padding
T = TypeVar("T", bound=msgspec.Struct)


class Enrolment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device asks to be known: POST /v1/enrolments."""

    token: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]  # the secret part of the token, hex
    device: Name
    signing_key: Hex32  # Ed25519 public key

    def __repr__(self) -> str:
        return f"Enrolment(token=…, device={self.device!r}, signing_key={self.signing_key!r})"


class Enrolled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer: the task and the key that signs its plans (its fingerprint was in the token)."""

    device: Name
    task: Name
    plan_key: Hex32  # Ed25519 public key


class TokenRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The operator asks for an enrolment token: POST /v1/operator/tokens."""

    device: Name
    ttl_s: Annotated[int, msgspec.Meta(ge=1, le=31_622_400)]  # at most a year, so that an expiry is always a date


class TokenAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The token to hand to the device."""

    device: str
    token: str  # as :class:`Token` prints it
    expires: float  # Unix time in seconds

    def __repr__(self) -> str:
        return f"TokenAnswer(device={self.device!r}, token=…, expires={self.expires!r})"


class Revocation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The operator asks that a device's key be refused from now on: POST /v1/operator/revocations."""

    device: Name


class Revoked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer; asked again, it is the same but for ``already``."""

    device: str
    revoked: float  # since when, Unix time in seconds
    already: bool  # it was before this request
    updates: int  # of applied rounds; they stay in the adapter
    open_round: int | None  # an update of it is counted in this round, which is open, and stays so; None: none is


class PlanKeyRotation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to POST /v1/operator/plan-key; the same but for ``already`` until ``round`` begins."""

    old: str  # Ed25519 public keys, hex
    new: str
    round: int  # the first whose plan is signed with the new one
    already: bool  # it was asked for before this request


class UpdateReceipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to an update; a second identical upload gets the same one."""

    device: str
    round: int
    digest: str  # SHA-256 of the sealed bytes, hex
    weight: int  # as counted, after the cap


class UpdateProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to a question for, or a part of, an update that is sent in parts."""

    digest: Hex32  # SHA-256 of the whole
    received: int  # bytes that are there, where the next part begins
    receipt: UpdateReceipt | None = None  # it counts; there is nothing left to send


class DeviceStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device as the operator sees it."""

    name: str
    enrolled: float  # Unix time in seconds
    last_seen: float | None
    left: bool
    updates: int  # counted in applied rounds, and not set aside
    bytes_up: int
    bytes_down: int
    peak_private_mb: float | None = None
    peak_total_mb: float | None = None
    train_s: float | None = None  # of its last update
    tier: int | None = None  # of its last update; None before it has sent any
    capability: Capability | None = None  # its own figures; None: never told
    capability_told: float | None = None  # Unix time in seconds
    revoked: float | None = None  # since when the operator refuses it for good, Unix time in seconds
    set_aside: int = 0  # updates that were acknowledged, and moved nothing because the operator's rule set them aside


class Outlier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A device whose update is far from those of the others of its round. Only the operator is told.

    Attributes:
        device: Which one.
        rule: ``norm``: of the change, as times the median norm; ``direction``: cosine of the angle between the change
            and the mean direction of the others.
        measured: Rounded to thousandths.
        bound: What it is beyond: above it for ``norm``, below it for ``direction``.
        devices: How many were compared, itself included.
        tier: They were compared in what this tier of the plan carries.
        kept: It counts all the same, because too few would have been left.
    """

    device: str
    rule: Literal["norm", "direction"]
    measured: float
    bound: float
    devices: int
    tier: int = 0
    kept: bool = False


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
    state: str = "train"  # of its plan; one that was measured has no losses, and a device weighs 1 in it
    # Components that it was to train and did not move, because fewer than two devices carried them, by module.
    idle: dict[str, tuple[int, ...]] = {}
    outliers: tuple[Outlier, ...] = ()  # those that are not ``kept`` are in none of the figures but ``bytes_up``
    judged: int | None = None  # devices that were compared with others; 0: too few came; None: there was no rule


class TaskStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GET /v1/operator/status."""

    task: str
    state: str  # "measuring", "training" or "finished"
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
    audit_head: str = ""  # digest of the newest entry of the audit log, hex


@dataclass(frozen=True)
class Token:
    """An enrolment token: 128 random bits and the SHA-256 of the key that will sign the plans, both hex.

    The fingerprint comes to the device by the operator's hand, so the device need not trust the network for it.
    """

    secret: str
    fingerprint: str

    def __str__(self) -> str:
        packed = base64.urlsafe_b64encode(bytes.fromhex(self.secret + self.fingerprint)).decode().rstrip("=")
        return f"ember1.{packed}"

    def __repr__(self) -> str:
        return "Token(…)"  # a token is a secret until it is used

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read a token as printed by ``emberlora cloud token``.

        Raises:
            RequestFormatError: it is not one.
        """
        match = _TOKEN.fullmatch(text.strip())
        if not match:
            raise RequestFormatError(
                "token: not an EmberLoRA token: expected 'ember1.' and 64 letters, digits, '_' or '-'"
            )
        raw = base64.urlsafe_b64decode(match[1])
        return cls(raw[:16].hex(), raw[16:].hex())


def encode_message(message: msgspec.Struct) -> bytes:
    """A message as JSON."""
    return msgspec.json.encode(message)


def decode_message(data: bytes, kind: type[T]) -> T:
    """Read a message strictly, of at most ``MAX_MESSAGE_BYTES``, the operator's view of a task ``MAX_STATUS_BYTES``.

    Raises:
        RequestFormatError: too long, not JSON, wrong or unknown fields.
    """
    most = MAX_STATUS_BYTES if kind is TaskStatus else MAX_MESSAGE_BYTES
    if len(data) > most:
        raise RequestFormatError(f"message: too long: expected at most {most} bytes, got {len(data)}")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestFormatError(f"message: not a {kind.__name__}: {str(error)[:200]}") from error
