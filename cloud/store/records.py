"""Rows as values."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_runtime.wire import Capability, LocalMetrics, UpdateReceipt


@dataclass(frozen=True)
class TokenRecord:
    """An enrolment token by the digest of its secret."""

    digest: str
    device: str
    expires: float
    used_by: str | None = None


@dataclass(frozen=True)
class DeviceRecord:
    """A device that is, or was, enrolled."""

    name: str
    signing_key: str
    enrolled: float
    last_seen: float | None = None
    left_at: float | None = None
    bytes_down: int = 0


@dataclass(frozen=True)
class RevocationRecord:
    """A device that the operator refuses for good, the key it had (hex), and since when (Unix seconds)."""

    device: str
    signing_key: str
    revoked: float


@dataclass(frozen=True)
class CapabilityRecord:
    """What a device measured of itself, and when it said so (Unix seconds)."""

    capability: Capability
    told: float


@dataclass(frozen=True)
class RoundRecord:
    """A round and its signed plan; the private key is there while updates may have to be opened."""

    round: int
    state: str
    plan: bytes
    opened: float
    deadline: float
    evidence: str  # what the plan was made from, as JSON
    master: str  # digest of the adapter the round's mean is added to; the plan names the published one
    changed: str  # since when the published adapter has each of its tensors, as JSON; see cloud.download.Published
    round_key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class UpdateRecord:
    """A counted update. Its sealed bytes are a blob named by ``receipt.digest`` until the round is final."""

    receipt: UpdateReceipt
    bytes: int
    received: float
    metrics: LocalMetrics


@dataclass(frozen=True)
class Contributions:
    """How many updates of a device are in applied rounds and how many of its were set aside; the bytes of all it
    sent."""

    updates: int = 0
    set_aside: int = 0
    bytes: int = 0
