"""The small files of a device's home: who it is, what it was told to use, where it is, what is still to be sent."""

from __future__ import annotations

from typing import Annotated

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_runtime.wire import Capability

_Key = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_KeyOrNone = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{64})?\Z")]


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """identity.json, mode 0600. ``task`` and ``plan_key`` are empty until the server has answered the enrolment."""

    server: str  # origin, "https://host:port"
    device: str
    private_key: _Key  # Ed25519, hex; never leaves this file but to sign
    task: str = ""
    plan_key: _KeyOrNone = ""  # Ed25519 public key that signs the plans, pinned by the token's fingerprint
    ca: str = ""  # PEM certificates that the server's own must come from; empty: the system's
    pending_key: _KeyOrNone = ""  # a new private key, hex, that the server may know already or not yet
    insecure_http: bool = False  # the user allowed plain http to another machine

    def __repr__(self) -> str:
        return f"Identity(server={self.server!r}, device={self.device!r}, task={self.task!r}, private_key=…)"

    @property
    def enrolled(self) -> bool:
        """Whether the server has accepted this device."""
        return bool(self.plan_key)

    def signing_key(self) -> Ed25519PrivateKey:
        """The key that signs requests."""
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(self.private_key))

    def plan_public_key(self) -> Ed25519PublicKey:
        """The key plans must be signed with."""
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.plan_key))


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """settings.json: which local files to train and evaluate on, as absolute paths."""

    data: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()


class DeviceState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """state.json: where this device is in its task. It only ever goes forward."""

    seen_round: int = -1  # highest round whose plan was accepted; older plans are refused
    done_round: int = -1  # this device has nothing more to do for rounds up to this one
    plan: str = ""  # digest of the accepted plan
    finished: bool = False
    bundle: str = ""  # digest of the bundle in use
    published: str = ""  # digest of the final adapter
    counted: int = 0  # updates the server has acknowledged
    bytes_up: int = 0  # bodies of requests, repeats included
    bytes_down: int = 0  # bodies of answers, repeats included
    adapter: str = ""  # digest of the adapter that came last, which the next one is patched from
    adapter_round: int = -1  # whose plan names it


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """capability.json: what this device measured of itself, and whether its aggregator has been told."""

    capability: Capability
    told: bool = False


class Pending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """outbox/round-N.json: a sealed update that the server has not acknowledged yet."""

    task: str
    round: int
    plan: str  # digest of the plan it answers
    digest: str  # SHA-256 of the sealed bytes, hex
    bytes: int
    weight: int


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """published/published.json: the task's last adapter and the bundle it belongs to."""

    task: str
    round: int
    bundle: str  # digest; the folder is bundles/<digest>
    adapter: str  # digest; the flat file is adapters/<digest>.safetensors
