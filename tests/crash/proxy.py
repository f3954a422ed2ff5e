"""A TCP proxy that does to connections what bad networks do to them.

Each :class:`Toxic` says what happens to one direction of a connection; a generator says to which connections, and where
in them. What arrives is passed on whole and in order, or the connection ends: TCP promises no less.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

_PIECE = 16 << 10
_ABANDONED_S = 30.0  # after so long a connection that went silent is dropped by everybody


@dataclass(frozen=True)
class Toxic:
    """What happens to the bytes of one direction; nothing by default."""

    delay_s: float = 0.0  # before a piece is passed on
    jitter_s: float = 0.0  # at most so much more
    slice_bytes: int = _PIECE  # pieces are at most this long, and each is a packet of its own
    bytes_s: float | None = None  # bandwidth
    cut_share: float = 0.0  # of the connections are reset …
    silent_share: float = 0.0  # … or go silent: nothing passes any more, and no side is told …
    within_bytes: int = 1  # … somewhere in the first so many bytes
    close_s: float = 0.0  # from the sender's end to when the receiver hears of it


@dataclass(frozen=True)
class Fate:
    """What was drawn for one direction of one connection: the byte after which it ends, and how."""

    at: int | None = None
    silent: bool = False


@dataclass
class Link:
    """A way to one server; use :func:`link` to open it."""

    port: int  # of the server
    up: Toxic  # device to server
    down: Toxic
    rng: random.Random
    happened: Counter[str] = field(default_factory=Counter)
    own_port: int = 0  # where devices connect to
    surprises: list[BaseException] = field(default_factory=list)
    _open: set[asyncio.Task[None]] = field(default_factory=set)  # connections
    _pumps: set[asyncio.Task[None]] = field(default_factory=set)  # their directions

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection until both directions have ended."""
        task = asyncio.current_task()
        assert task is not None, "asyncio calls this in one"
        self._open.add(task)
        try:
            await self._carry(reader, writer)
        finally:
            self._open.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.happened["connections"] += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.transport.abort()
            return
        for end in (writer, far_writer):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer, self.up)),
            asyncio.create_task(self._pump(far_reader, writer, self.down)),
        ]
        self._pumps.update(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
        for pump in pumps:
            pump.cancel()
        ended = await asyncio.gather(*pumps, return_exceptions=True)
        self._pumps.difference_update(pumps)
        for end in (writer, far_writer):
            if ended == [None, None]:
                end.close()
            else:
                _reset(end)
        self.surprises += [one for one in ended if one is not None and not isinstance(one, _ENDINGS)]

    async def close(self) -> None:
        """End every connection."""
        for pump in self._pumps:
            pump.cancel()
        while self._open:
            await asyncio.wait(self._open)
        await asyncio.sleep(0)  # in which the loop lets go of the sockets

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, toxic: Toxic) -> None:
        fate, passed = self._fate(toxic), 0
        while data := await reader.read(_PIECE):
            for start in range(0, len(data), toxic.slice_bytes):
                piece = data[start : start + toxic.slice_bytes]
                end = fate.at is not None and passed + len(piece) >= fate.at
                if fate.at is not None and end:
                    piece = piece[: fate.at - passed]
                await self._pass(piece, writer, toxic)
                passed += len(piece)
                if end:
                    await self._end(fate)
        await asyncio.sleep(toxic.close_s)
        self.happened["slow closes"] += toxic.close_s > 0
        if writer.can_write_eof():
            with contextlib.suppress(OSError):  # the peer has reset it: there is nobody left to tell
                writer.write_eof()

    def _fate(self, toxic: Toxic) -> Fate:
        drawn, at = self.rng.random(), self.rng.randint(0, toxic.within_bytes)
        if drawn < toxic.cut_share:
            return Fate(at)
        return Fate(at, silent=True) if drawn < toxic.cut_share + toxic.silent_share else Fate()

    async def _pass(self, piece: bytes, writer: asyncio.StreamWriter, toxic: Toxic) -> None:
        wait_s = toxic.delay_s + self.rng.uniform(0, toxic.jitter_s)
        if toxic.bytes_s is not None:
            wait_s += len(piece) / toxic.bytes_s
        await asyncio.sleep(wait_s)
        self.happened["pieces"] += 1
        writer.write(piece)
        await writer.drain()

    async def _end(self, fate: Fate) -> None:
        self.happened["silences" if fate.silent else "cuts"] += 1
        if fate.silent:
            await asyncio.sleep(_ABANDONED_S)
        raise _CutError


class _CutError(Exception):
    """The connection ends here."""


_ENDINGS = (_CutError, ConnectionError, asyncio.CancelledError)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection so that the peer is told that it broke, not that it is complete."""
    with contextlib.suppress(OSError):  # it has ended by itself
        option = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")  # linger on, for no time: RST in place of FIN
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
    writer.transport.abort()


@contextlib.asynccontextmanager
async def link(port: int, *, up: Toxic, down: Toxic, rng: random.Random) -> AsyncIterator[Link]:
    """A proxy on loopback to the server at ``port`` while the block runs."""
    made = Link(port, up, down, rng)
    server = await asyncio.start_server(made.accept, "127.0.0.1", 0)
    made.own_port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made.close()
        await server.wait_closed()
