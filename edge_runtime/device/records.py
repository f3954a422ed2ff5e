"""The small files of a device's home: who it is, what it was told to use, where it is, what is still to be sent.

What says "encrypted" is so under the home's storage key; see :mod:`edge_runtime.at_rest`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.device.eligibility import Rules
from edge_runtime.device.floors import Floors
from edge_runtime.wire import Capability

_Key = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_KeyOrNone = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-f]{64})?\Z")]


class Membership(msgspec.Struct, frozen=True):
    """What of identity.json everyone may know, and a device without its storage key can still say."""

    server: str
    device: str
    task: str = ""
    plan_key: _KeyOrNone = ""

    @property
    def enrolled(self) -> bool:
        """Whether the server has accepted this device."""
        return bool(self.plan_key)


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who a device is. ``task`` and ``plan_key`` are empty until the server has answered the enrolment.

    Homes of older versions have it as identity.json; a :class:`StoredIdentity` is what is there now.
    """

    server: str  # origin, "https://host:port"
    device: str
    private_key: _Key  # Ed25519, hex; never leaves the device
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


class PrivateKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of an identity is encrypted."""

    private_key: _Key
    pending_key: _KeyOrNone = ""

    def __repr__(self) -> str:
        return "PrivateKeys(…)"


class StoredIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """identity.json: an identity whose private keys are encrypted, and bound to all the rest of it."""

    server: str
    device: str
    task: str
    plan_key: _KeyOrNone
    ca: str
    insecure_http: bool
    keys: bytes = b""  # encrypted PrivateKeys; base64 in JSON

    @classmethod
    def around(cls, identity: Identity) -> StoredIdentity:
        """All of an identity but its keys."""
        names = (name for name in cls.__struct_fields__ if name != "keys")
        return cls(**{name: getattr(identity, name) for name in names})

    def bound(self) -> bytes:
        """What the keys are bound to: a changed server, CA or plan key is noticed when they are opened."""
        return msgspec.json.encode(msgspec.structs.replace(self, keys=b""))

    def with_keys(self, keys: PrivateKeys) -> Identity:
        """The identity that these are the keys of."""
        rest = {name: getattr(self, name) for name in self.__struct_fields__ if name != "keys"}
        return Identity(**rest, private_key=keys.private_key, pending_key=keys.pending_key)


class KeyPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """storage.json: where the key is that this home is encrypted under, and which one it is."""

    kind: Literal["file", "keyring", "credential"]
    where: str  # a path; the name of an entry of the system's key store; the name of a credential
    key_id: str = ""  # hex

    def __str__(self) -> str:
        kind = {"file": "file", "keyring": "the system's key store, entry", "credential": "credential"}[self.kind]
        return f"{kind} {self.where}"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """settings.json: which local files to train and evaluate on, as absolute paths, when to train, what never to do."""

    data: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()
    rules: Rules = Rules()
    floors: Floors = Floors()


class DeviceState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """state.json: where this device is in its task. It only ever goes forward."""

    seen_round: int = -1  # highest round whose plan was accepted; older plans are refused
    done_round: int = -1  # this device has nothing more to do for rounds up to this one
    plan: str = ""  # digest of the accepted plan
    finished: bool = False
    bundle: str = ""  # digest of the bundle in use
    published: str = ""  # digest of the final adapter
    counted: int = 0  # updates the server has acknowledged
    counted_at: float = 0.0  # when it acknowledged the last one, Unix seconds by this device's clock
    bytes_up: int = 0  # bodies of requests, repeats included
    bytes_down: int = 0  # bodies of answers, repeats included
    adapter: str = ""  # digest of the adapter that came last, which the next one is patched from
    adapter_round: int = -1  # whose plan names it


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """capability.json: what this device measured of itself, and whether its aggregator has been told."""

    capability: Capability
    told: bool = False


class Pending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """outbox/round-N.record, encrypted: a sealed update that the server has not acknowledged yet."""

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
