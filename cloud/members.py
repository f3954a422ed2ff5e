"""Who may speak: tokens, enrolled devices, the operator, and what was last seen of each.

The decision whether an enrolment holds is :func:`judge_enrolment`, pure; the database makes it inside one transaction.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloud import events
from cloud.errors import DataError, DataFullError
from cloud.keyring import Keyring
from cloud.store import CapabilityRecord, Contributions, Database, DeviceRecord, RevocationRecord, TokenRecord
from edge_runtime import wire
from edge_runtime.wire.messages import OPERATOR

_MAX_TTL_S = 7 * 24 * 3600


def judge_enrolment(
    token: TokenRecord | None,
    known: DeviceRecord | None,
    revoked: Sequence[RevocationRecord],
    *,
    request: wire.Enrolment,
    now: float,
) -> DeviceRecord:
    """The device record that an enrolment makes.

    The same device repeating its enrolment (its first answer was lost) gets the same record, even after the token ran
    out. A device that left comes back with a new token, and may bring a new key. A revoked one never does: neither its
    name, which the log and all figures know it by, nor its key under another.

    Raises:
        TokenError: the token is unknown, used, run out or for another name, or the name is taken.
        DeviceRevokedError: the name or the key was revoked.
    """
    device = request.device
    enrolled = known is not None and known.left_at is None
    if token is None:
        raise wire.TokenError(f"enrolment of {device}: the token is unknown")
    if token.device != device:
        raise wire.TokenError(f"enrolment of {device}: the token was made for another name")
    for old in revoked:
        if device == old.device or request.signing_key == old.signing_key:
            what = "this name" if device == old.device else f"its key, as that of {old.device},"
            raise wire.DeviceRevokedError(f"enrolment of {device}: {what} was revoked by the operator")
    if token.used_by is not None:
        if enrolled and known is not None and token.used_by == known.signing_key == request.signing_key:
            return known
        raise wire.TokenError(f"enrolment of {device}: the token was used before")
    if now > token.expires:
        raise wire.TokenError(f"enrolment of {device}: the token ran out {now - token.expires:.0f} s ago")
    if enrolled:
        raise wire.TokenError(f"enrolment of {device}: a device of this name is enrolled already")
    if known is not None:
        return replace(known, signing_key=request.signing_key, enrolled=now, left_at=None)
    return DeviceRecord(device, request.signing_key, now)


@functools.lru_cache(maxsize=4096)  # to read a key takes a tenth of what it takes to verify a request with it
def _public_key(signing_key: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(signing_key))


class Members:
    """Devices and operator of one task."""

    def __init__(
        self,
        database: Database,
        keys: Keyring,
        *,
        clock: Callable[[], float],
        entropy: Callable[[int], bytes],
        report: events.Report,
    ) -> None:
        self._database = database
        self._keys = keys
        self._clock = clock
        self._entropy = entropy
        self._report = report
        self._devices: dict[str, DeviceRecord] = {}
        self._revoked: dict[str, RevocationRecord] = {}
        self._traffic: dict[str, tuple[float, int]] = {}
        self._arrivals: dict[tuple[int, str], float] = {}
        self._refusals: Counter[tuple[str, str]] = Counter()

    async def start(self) -> None:
        """Read who is enrolled, and who is refused."""
        self._devices = {record.name: record for record in await self._database.call(self._database.devices)}
        self._revoked = {record.device: record for record in await self._database.call(self._database.revocations)}

    def key_of(self, name: str) -> Ed25519PublicKey:
        """The key that ``name``'s requests must be signed with.

        Raises:
            UnknownDeviceError: never enrolled, or it left.
            DeviceRevokedError: the operator refuses it.
        """
        if name == OPERATOR:
            return self._keys.operator
        if name in self._revoked:
            raise wire.DeviceRevokedError(f"device {name}: was revoked by the operator")
        record = self._devices.get(name)
        if record is None or record.left_at is not None:
            raise wire.UnknownDeviceError(f"device {name}: {'has left' if record else 'is not enrolled'}")
        return _public_key(record.signing_key)

    async def make_token(self, request: wire.TokenRequest) -> wire.TokenAnswer:
        """A token that lets one device of this name enrol once.

        Raises:
            RequestFormatError: not a device name, or a lifetime outside one second to a week.
            NotPermittedError: a device of this name is enrolled, or was revoked.
        """
        name = wire.check_name(request.device, what="device")
        if name == OPERATOR:
            raise wire.RequestFormatError(f"device {name!r}: this name is taken by the operator")
        if not 1 <= request.ttl_s <= _MAX_TTL_S:
            raise wire.RequestFormatError(f"token: lifetime: expected 1 to {_MAX_TTL_S} s, got {request.ttl_s}")
        if name in self._revoked:
            raise wire.NotPermittedError(f"device {name}: was revoked, and its name does not come back; choose another")
        record = self._devices.get(name)
        if record is not None and record.left_at is None:
            raise wire.NotPermittedError(f"device {name}: is enrolled already; choose another name")
        secret = self._entropy(16)
        now = self._clock()
        expires = now + request.ttl_s
        row = TokenRecord(hashlib.sha256(secret).hexdigest(), name, expires)
        await self._database.call(self._database.add_token, row, now)
        return wire.TokenAnswer(
            device=name, token=str(wire.Token(secret.hex(), self._keys.fingerprint)), expires=expires
        )

    async def enrol(self, request: wire.Enrolment, *, task: str) -> wire.Enrolled:
        """Make a device known.

        Raises:
            RequestFormatError: name, token or key are malformed.
            TokenError, DeviceRevokedError: see :func:`judge_enrolment`.
        """
        device = wire.check_name(request.device, what="device")
        try:
            secret, key = bytes.fromhex(request.token), bytes.fromhex(request.signing_key)
            Ed25519PublicKey.from_public_bytes(key)
        except ValueError as error:
            raise wire.RequestFormatError(f"enrolment of {device}: token or key are not keys in hex") from error
        request = wire.Enrolment(token=secret.hex(), device=device, signing_key=key.hex())
        now = self._clock()
        record = await self._database.call(
            self._database.enrol,
            hashlib.sha256(secret).hexdigest(),
            device,
            lambda token, known, revoked: judge_enrolment(token, known, revoked, request=request, now=now),
        )
        if self._devices.get(device) != record:
            self._devices[device] = record
            self._report(events.DeviceEnrolled(device))
        return wire.Enrolled(device=device, task=task, plan_key=self._keys.plan_key)

    async def rekey(self, name: str, message: wire.NewKey) -> None:
        """A device, which signed this with its key, replaces that key. Repeated with the new key, it changes nothing.

        Raises:
            RequestFormatError, SignatureError: see :func:`edge_runtime.wire.check_new_key`.
            NotPermittedError: the new key is, or was, another's or its own.
        """
        wire.check_new_key(name, message)
        record = self._devices[name]
        if message.signing_key == record.signing_key:
            return
        keys = record.signing_key, message.signing_key
        if not await self._database.call(self._database.rekey, name, *keys, self._clock()):
            raise wire.NotPermittedError(f"new key of {name}: was in use before; make a new one")
        self._devices[name] = replace(self._devices[name], signing_key=message.signing_key)
        self._report(events.DeviceRekeyed(name))

    async def leave(self, name: str, *, by: str) -> None:
        """A device leaves, or ``by`` the operator is sent away; its key is refused from now on, its counted updates
        stay counted.

        Raises:
            UnknownDeviceError: it is not enrolled.
        """
        self.key_of(name)
        if name == OPERATOR:
            raise wire.UnknownDeviceError(f"device {name}: is not a device")
        now = self._clock()
        await self._database.call(self._database.leave, name, now, by=by)
        self._devices[name] = replace(self._devices[name], left_at=now)
        self._report(events.DeviceLeft(name))

    async def revoke(self, request: wire.Revocation) -> wire.Revoked:
        """The operator refuses a device for good, also one that left. What was counted of it stays counted, in the open
        round too: its sum was promised when the update was acknowledged.

        Raises:
            UnknownDeviceError: no device of this name was ever enrolled.
        """
        name = request.device
        known = self._devices.get(name)
        if known is None:
            raise wire.UnknownDeviceError(f"device {name}: was never enrolled")
        new = RevocationRecord(name, known.signing_key, self._clock())
        kept = await self._database.call(self._database.revoke, new)
        already, self._revoked[name] = name in self._revoked, kept
        if not already:
            self._report(events.DeviceRevoked(name))
        given = await self._database.call(self._database.contributions)
        updates = given.get(name, Contributions()).updates
        last = await self._database.call(self._database.last_round)
        open_round = last.round if last is not None and last.state == "open" else None
        if open_round is not None and await self._database.call(self._database.receipt_of, open_round, name) is None:
            open_round = None
        return wire.Revoked(device=name, revoked=kept.revoked, already=already, updates=updates, open_round=open_round)

    async def tell(self, name: str, capability: wire.Capability) -> None:
        """Keep what a device measured of itself; the newest counts."""
        self.saw(name)
        await self._database.call(self._database.put_capability, name, CapabilityRecord(capability, self._clock()))

    def saw(self, name: str, *, sent_bytes: int = 0) -> None:
        """Note that a device was heard of and that bytes went to it; written to disk by :meth:`flush`."""
        if name in self._devices:
            _, sent = self._traffic.get(name, (0.0, 0))
            self._traffic[name] = (self._clock(), sent + sent_bytes)

    def arrived(self, name: str, round_: int, seconds: float) -> None:
        """Note how long the body of a counted update took; a clock that was set back meanwhile tells nothing."""
        if seconds > 0:
            self._arrivals[round_, name] = seconds

    def refused(self, name: str, problem: str) -> None:
        """Note that an update of a known device was refused, with the name of the problem."""
        if name in self._devices:
            self._refusals[name, problem] += 1

    async def flush(self) -> None:
        """Write what was noted. These figures are for people: a kill may lose the last seconds of them.

        Raises:
            DataError: the disk does not take them; they are kept for the next time.
        """
        traffic, self._traffic = self._traffic, {}
        arrivals, self._arrivals = self._arrivals, {}
        refusals, self._refusals = self._refusals, Counter()
        rows = [(name, seen, sent) for name, (seen, sent) in traffic.items()]
        try:
            if rows or arrivals or refusals:
                await self._database.call(self._database.note, rows, arrivals, refusals, self._clock())
        except DataError:  # what was noted meanwhile is newer
            for name, seen, sent in rows:
                later, more = self._traffic.get(name, (seen, 0))
                self._traffic[name] = later, sent + more
            self._arrivals = arrivals | self._arrivals
            self._refusals.update(refusals)
            raise

    async def statuses(self) -> tuple[wire.DeviceStatus, ...]:
        """Every device as the operator sees it, by name; of a disk that is full what was written before."""
        with contextlib.suppress(DataFullError):  # which is when an operator wants to see it
            await self.flush()
        return await read_statuses(self._database)


async def read_statuses(database: Database) -> tuple[wire.DeviceStatus, ...]:
    """Every device of a store as the operator sees it, by name."""
    records = await database.call(database.devices)
    given = await database.call(database.contributions)
    told = await database.call(database.capabilities)
    revoked = {record.device: record.revoked for record in await database.call(database.revocations)}
    last = {update.receipt.device: update.metrics for update in await database.call(database.last_updates)}
    statuses = (_status(record, given, last.get(record.name), told.get(record.name)) for record in records)
    return tuple(msgspec.structs.replace(status, revoked=revoked.get(status.name)) for status in statuses)


def _status(
    record: DeviceRecord,
    given: Mapping[str, Contributions],
    last: wire.LocalMetrics | None,
    told: CapabilityRecord | None,
) -> wire.DeviceStatus:
    own = given.get(record.name, Contributions())
    metrics = last or wire.LocalMetrics()
    return wire.DeviceStatus(
        name=record.name,
        enrolled=record.enrolled,
        last_seen=record.last_seen,
        left=record.left_at is not None,
        updates=own.updates,
        set_aside=own.set_aside,
        bytes_up=own.bytes,
        bytes_down=record.bytes_down,
        peak_private_mb=metrics.peak_private_mb,
        peak_total_mb=metrics.peak_total_mb,
        train_s=metrics.seconds,
        tier=None if last is None else last.tier,
        capability=None if told is None else told.capability,
        capability_told=None if told is None else told.told,
    )
