"""The key that plans must be signed with, and the one way in which it changes: by statements of the key before it.

A plan by another key makes the device ask for the statements, once a poll. The key that they lead to is kept only when
it has signed the plan that is in hand and the answer that it came in; all else leaves this device as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_runtime.device import events
from edge_runtime.device.home import Home
from edge_runtime.device.transport import Transport
from edge_runtime.wire import NotFoundError, PlanSignatureError, follow_keys

T = TypeVar("T")


class PlanTrust:
    """Whose plans one device obeys."""

    def __init__(self, home: Home, client: Transport, report: Callable[[events.DeviceEvent], None]) -> None:
        identity = home.identity()
        self.plan_key = identity.plan_key  # hex
        self._task = identity.task
        self._home = home
        self._client = client
        self._report = report

    async def checked(self, check: Callable[[Ed25519PublicKey], T]) -> T:
        """What ``check`` gives for the key that is trusted, or for one that its statements lead to, which then is.

        Args:
            check: Demands that plan and answer are by a key; raises PlanSignatureError for a plan that is not.

        Raises:
            PlanSignatureError: the plan is by none of these keys, or the aggregator knows of no statements.
            PlanKeyError: they do not start at the key that is trusted, or break.
            TransportError, RequestError: the statements cannot be had.
        """
        try:
            return check(_loaded(self.plan_key))
        except PlanSignatureError:
            for key in await self._reached():
                try:
                    found = check(_loaded(key))
                except PlanSignatureError:  # the plan may be older than the newest statement
                    continue
                self._trust(key)
                return found
            raise

    async def _reached(self) -> tuple[str, ...]:
        try:
            chain = await self._client.plan_keys(self._task)
        except NotFoundError:  # an aggregator from before statements
            return ()
        return follow_keys(chain.statements, task=self._task, trusted=self.plan_key)

    def _trust(self, key: str) -> None:
        self._home.save_identity(msgspec.structs.replace(self._home.identity(), plan_key=key))
        self.plan_key = key
        self._report(events.PlanKeyChanged(key))


def _loaded(key: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
