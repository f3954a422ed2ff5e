"""How many connections there may be, decided before a byte of theirs is read.

One that says nothing costs the server memory and a file until it is closed for its silence. So there is a bound for all
of them, and a lower one for those of one address, which a single machine can reach; a connection over a bound is closed
at once and without an answer. Addresses of this machine have only the bound for all: they are the operator's, or those
of a proxy that speaks for everybody.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from functools import lru_cache
from typing import cast

from aiohttp import web

from cloud.config import ServerConfig

_NETWORK_BITS = 64  # of an IPv6 address: one customer has all addresses below


class Door:
    """A protocol factory that lets connections through to the HTTP server or closes them."""

    def __init__(self, server: web.Server, config: ServerConfig) -> None:
        self._server = server
        self._most = config.max_connections
        self._most_per_address = config.max_connections_per_address

    def __call__(self) -> asyncio.Protocol:
        """The protocol of a connection that has just been accepted."""
        return _Newcomer(self)

    def handler_for(self, address: str) -> asyncio.Protocol | None:
        """Who speaks HTTP with a connection from there; None: it is one too many."""
        present, source = self._server.connections, source_of_address(address)
        # Fewer than may come from one address need not be looked at one by one.
        crowded = (
            source is not None
            and len(present) >= self._most_per_address
            and sum(source_of(other.transport) == source for other in present) >= self._most_per_address
        )
        return None if crowded or len(present) >= self._most else self._server()


class _Newcomer(asyncio.Protocol):
    """A connection before it is let through; it has read nothing."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)  # of a stream socket
        handler = self._door.handler_for(_address(transport))
        if handler is None:
            transport.abort()
            return
        transport.set_protocol(handler)
        handler.connection_made(transport)


class BoundedSite(web.BaseSite):
    """Listens as ``web.TCPSite`` does, with a :class:`Door` before the server."""

    __slots__ = ("_config",)

    def __init__(self, runner: web.BaseRunner, config: ServerConfig, *, ssl_context: ssl.SSLContext | None) -> None:
        super().__init__(runner, ssl_context=ssl_context)
        self._config = config

    @property
    def name(self) -> str:
        """Where it listens."""
        return f"{'https' if self._ssl_context else 'http'}://{self._config.host}:{self._config.port}"

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address cannot be used.
        """
        await super().start()
        server = self._runner.server
        assert server is not None, "the runner was set up, or the site could not be made"
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            Door(server, self._config),
            self._config.host,
            self._config.port,
            ssl=self._ssl_context,
            backlog=self._backlog,
        )


def source_of(transport: asyncio.BaseTransport | None) -> str | None:
    """Whom a connection is counted for; None: nobody, or it is closed."""
    return None if transport is None else source_of_address(_address(transport))


@lru_cache(maxsize=1 << 14)  # asked of every connection there is
def source_of_address(address: str) -> str | None:
    """Whom connections from an address are counted for: it, or the network of an IPv6 one; None: this machine."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a socket without addresses
        return None
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback:
        return None
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, _NETWORK_BITS), strict=False))


def _address(transport: asyncio.BaseTransport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if peer else ""
