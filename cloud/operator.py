"""The operator's side: signed requests to the server of a data folder."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec

from cloud.errors import ServerAbsentError, ServerRefusedError
from cloud.keys import KEYS_FOLDER, Keys, load_keys
from edge_runtime import wire
from edge_runtime.wire import resources
from edge_runtime.wire.messages import OPERATOR

URL_NAME = "server.url"  # in the data folder while a server runs
PIN_NAME = "server.sha256"  # the same, of a server that speaks TLS: SHA-256 of its certificate, hex
_TIMEOUT_S = 60
T = TypeVar("T", bound=msgspec.Struct)


class OperatorClient:
    """Asks the server that runs on a data folder."""

    def __init__(
        self,
        url: str,
        keys: Keys,
        *,
        clock: Callable[[], float],
        entropy: Callable[[int], bytes],
        pin: str | None = None,
    ) -> None:
        """``pin`` is the SHA-256 of the server's certificate, hex: whatever names it has, no other is talked to."""
        self._url = url.rstrip("/")
        self._keys = keys
        self._clock = clock
        self._entropy = entropy
        self._tls = True if pin is None else aiohttp.Fingerprint(bytes.fromhex(pin))

    @classmethod
    def of_folder(cls, data: Path, *, clock: Callable[[], float], entropy: Callable[[int], bytes]) -> OperatorClient:
        """The client for the server that runs on this data folder.

        Raises:
            DataMissingError: there are no keys.
            ServerAbsentError: no server runs.
        """
        keys = load_keys(data / KEYS_FOLDER)
        try:
            url = (data / URL_NAME).read_text().strip()
            pin = (data / PIN_NAME).read_text().strip() if url.startswith("https:") else None
        except OSError as error:
            raise ServerAbsentError(
                f"{data}: no aggregator runs on this folder; start it with `emberlora cloud serve`"
            ) from error
        return cls(url, keys, clock=clock, entropy=entropy, pin=pin)

    async def status(self) -> wire.TaskStatus:
        """Rounds, devices, figures."""
        return await self._ask("GET", resources.OPERATOR_STATUS, b"", wire.TaskStatus)

    async def make_token(self, device: str, ttl_s: int) -> wire.TokenAnswer:
        """A token for one enrolment."""
        body = wire.encode_message(wire.TokenRequest(device=device, ttl_s=ttl_s))
        return await self._ask("POST", resources.OPERATOR_TOKENS, body, wire.TokenAnswer)

    async def revoke(self, device: str) -> wire.Revoked:
        """Refuse a device's key from now on."""
        body = wire.encode_message(wire.Revocation(device=device))
        return await self._ask("POST", resources.OPERATOR_REVOCATIONS, body, wire.Revoked)

    async def rotate_plan_key(self) -> wire.PlanKeyRotation:
        """Have the next round's plan signed with a new key."""
        return await self._ask("POST", resources.OPERATOR_PLAN_KEY, b"", wire.PlanKeyRotation)

    async def stop(self) -> wire.TaskStatus:
        """End the task; the status after it."""
        return await self._ask("POST", resources.OPERATOR_STOP, b"", wire.TaskStatus)

    async def _ask(self, method: str, target: str, body: bytes, kind: type[T]) -> T:
        digest = hashlib.sha256(body).hexdigest()
        nonce = self._entropy(16).hex()
        request = wire.SignedRequest(OPERATOR, method, target, digest, int(self._clock()), nonce)
        headers = {"Authorization": wire.authorization(request, self._keys.operator)}
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, middlewares=[_once]) as session,
                session.request(
                    method, self._url + target, data=body or None, headers=headers, ssl=self._tls
                ) as response,
            ):
                data, status = await response.read(), response.status
        except aiohttp.ServerFingerprintMismatch as error:
            raise ServerAbsentError(
                f"{self._url}: another server answers there: its certificate is not the one of this folder's aggregator"
            ) from error
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise ServerAbsentError(f"{self._url}: no aggregator answers ({error})") from error
        if status >= 400:
            raise ServerRefusedError(str(wire.decode_problem(data, status=status)))
        return msgspec.json.decode(data, type=kind)


async def _once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Tell of a connection that breaks; aiohttp would send the same nonce again, and be refused for it."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:  # this one it does not repeat, and the certificate is told from it
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(str(error)) from error
