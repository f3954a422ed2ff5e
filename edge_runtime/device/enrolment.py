"""Becoming known to an aggregator: the key is made here, and the server proves itself by the token's fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass

import msgspec

from edge_runtime.device.client import Client
from edge_runtime.device.errors import EnrolledError, InputError, PinMismatchError
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from edge_runtime.device.records import Identity
from edge_runtime.device.rekeying import settle
from edge_runtime.device.trust import tls_of
from edge_runtime.wire import (
    DeviceRevokedError,
    Enrolled,
    Enrolment,
    NotFoundError,
    NotPermittedError,
    PlanKeyError,
    RequestError,
    Token,
    UnknownDeviceError,
    check_name,
    follow_keys,
)
from edge_runtime.wire.messages import OPERATOR


@dataclass(frozen=True)
class Trust:
    """What the user allows towards a server, kept with the identity."""

    ca: str = ""  # PEM certificates that its own must come from; empty: the system's
    insecure_http: bool = False  # plain http to another machine


async def enrol(
    home: Home,
    *,
    server: str,
    token: Token,
    device: str,
    host: Host,
    trust: Trust = Trust(),  # frozen
) -> Identity:
    """Make this home a device of the server's task.

    The key is on disk before the request leaves, so that after a lost answer the same call with the same token
    repeats it with the same key.

    Args:
        home: A home without an identity, or with one whose enrolment was not answered.
        server: Origin, from :func:`edge_runtime.device.trust.check_server`.
        token: From the operator.
        device: The name the token was made for.
        host: Entropy for the key.
        trust: Kept with the identity; given again after a failure, it takes the place of what was kept.

    Raises:
        EnrolledError: this home is a device already.
        RequestFormatError: ``device`` is no name, or a reserved one.
        TokenError, RequestError: the server's refusal.
        PinMismatchError: the server is not the one the token names, nor shows that its key follows the token's;
            nothing is enrolled here.
        UntrustedServerError: its certificate is not to be trusted.
        TransportError: no answer.
    """
    check_name(device, what="device")
    if device == OPERATOR:
        raise InputError(f"device {device!r}: this name is the operator's: choose another")
    identity = home.stored_identity()
    if identity is not None and identity.enrolled:
        raise EnrolledError(
            f"{home.folder}: already enrolled as {identity.device} in task {identity.task} at {identity.server}: "
            "run 'emberlora edge leave' first, or pass another --home"
        )
    if identity is None or (identity.server, identity.device) != (server, device):
        identity = Identity(server=server, device=device, private_key=host.entropy(32).hex())
    identity = msgspec.structs.replace(identity, ca=trust.ca, insecure_http=trust.insecure_http)
    home.save_identity(identity)
    public = identity.signing_key().public_key().public_bytes_raw().hex()
    async with Client(server, host, tls=tls_of(identity)) as client:
        answer = await client.enrol(Enrolment(token.secret, device, public))
    if answer.device != device or not await _is_pinned(identity, answer, token.fingerprint, host):
        raise PinMismatchError(
            f"{server}: not the aggregator this token is for: its plan key has another fingerprint; "
            "nothing was enrolled"
        )
    enrolled = msgspec.structs.replace(identity, task=answer.task, plan_key=answer.plan_key)
    home.save_identity(enrolled)
    return enrolled


async def _is_pinned(identity: Identity, answer: Enrolled, fingerprint: str, host: Host) -> bool:
    """Whether an answer's plan key is the one the token names, or one to which statements lead from that."""
    if _fingerprint(answer.plan_key) == fingerprint:
        return True
    try:
        async with Client.of(identity, host) as client:
            statements = (await client.plan_keys(answer.task)).statements
        pinned = next((one.old for one in statements if _fingerprint(one.old) == fingerprint), None)
        return pinned is not None and answer.plan_key in follow_keys(statements, task=answer.task, trusted=pinned)
    except (RequestError, PlanKeyError):  # whoever answers there has nothing to show for itself
        return False


def _fingerprint(key: str) -> str:
    return hashlib.sha256(bytes.fromhex(key)).hexdigest()


async def leave(home: Home, *, host: Host) -> Identity:
    """Make the server forget this device, then this home; downloads and a published adapter stay.

    Raises:
        NotEnrolledError: there is nothing to leave.
        RequestError: the server's refusal; one that knows the device no longer, or has revoked it, is taken for
            consent.
        TransportError: no answer; nothing has changed here.
    """
    identity = home.identity()
    with contextlib.suppress(UnknownDeviceError, DeviceRevokedError):
        with contextlib.suppress(NotFoundError, NotPermittedError):  # then the old key is tried
            await settle(home, host=host)
        async with Client.of(home.identity(), host) as client:
            await client.leave()
    home.forget()
    return identity
