"""A new key for an enrolled device. At every instant one of the two keys in its home is the one the server knows.

The new key is on disk before the request leaves. When the answer is lost nobody here knows which key counts, so the
request is sent again: signed with the old key, and where that is refused, with the new one, which is known by then.
"""

from __future__ import annotations

import msgspec

from edge_runtime.device.client import Client
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from edge_runtime.device.records import Identity
from edge_runtime.wire import NotPermittedError, SignatureError, new_key


async def rotate(home: Home, *, host: Host) -> Identity:
    """Give this device a new key; one whose answer was lost is finished instead.

    Args:
        home: Of an enrolled device; the caller holds its lock.
        host: Entropy for the key.

    Raises:
        NotEnrolledError: there is no key to replace.
        NotPermittedError: the server's refusal; the old key goes on counting.
        RequestError: another refusal, which leaves all as it is.
        TransportError: no answer; whatever the server has done, :func:`settle` finds it out later.
    """
    identity = home.identity()
    if not identity.pending_key:
        home.save_identity(msgspec.structs.replace(identity, pending_key=host.entropy(32).hex()))
    return await settle(home, host=host)


async def settle(home: Home, *, host: Host) -> Identity:
    """Finish a change of keys that was begun, if one was; the identity after it.

    Raises:
        As :func:`rotate`.
    """
    identity = home.identity()
    if not identity.pending_key:
        return identity
    after = msgspec.structs.replace(identity, private_key=identity.pending_key, pending_key="")
    message = new_key(identity.device, after.signing_key())
    try:
        async with Client.of(identity, host) as client:
            await client.rekey(message)
    except NotPermittedError:
        # Only who signed well is told so, hence the old key counts. No other refusal shows that: a key that may be the
        # one that counts is never thrown away.
        home.save_identity(msgspec.structs.replace(identity, pending_key=""))
        raise
    except SignatureError:  # the server has the new one, or does not believe this device's clock
        async with Client.of(after, host) as client:
            await client.rekey(message)
    home.save_identity(after)
    return after
