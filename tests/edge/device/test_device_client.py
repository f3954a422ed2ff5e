"""What a client makes of a connection that breaks, and of an answer that is deflated."""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.device.client import Client, Signer
from edge_runtime.device.errors import TransportError
from edge_runtime.device.host import Host
from edge_runtime.device.outbox import pending_for
from edge_runtime.wire.plan import MAX_PLAN_BYTES


@pytest.mark.parametrize("how", ["plan", "leave", "upload"])
async def test_a_broken_connection_is_told_and_no_request_is_repeated(tmp_path: Path, how: str) -> None:
    """aiohttp sent it again with the same nonce, and the user read of a replay."""
    requests = []

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n"))
        writer.transport.abort()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, Client(url, Host(), signer=Signer("pi-1", Ed25519PrivateKey.generate())) as client:
        pending = pending_for("tiny", 0, "0" * 64, sealed=b"sealed", weight=1)
        calls = {
            "plan": lambda: client.plan("tiny", after=-1, wait_s=0),
            "leave": client.leave,
            "upload": lambda: client.upload(pending, b"sealed"),
        }
        with pytest.raises(TransportError, match="cannot be reached"):
            await calls[how]()
    assert len(requests) == 1


async def plan_of(body: bytes, encoding: str = "deflate") -> tuple[bytes | None, int, list[str]]:
    """What a client has of a plan whose answer has this body; bytes that came; what encodings it asked for."""
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.headers["Accept-Encoding"])
        return web.Response(body=body, headers={"Content-Encoding": encoding} if encoding else {})

    app = web.Application()
    app.router.add_get("/{any:.*}", answer)
    async with TestServer(app) as server:
        url = str(server.make_url("")).rstrip("/")
        async with Client(url, Host(), signer=Signer("pi-1", Ed25519PrivateKey.generate())) as client:
            found = await client.plan("tiny", after=-1, wait_s=0)
            return found.data, client.traffic.down, asked


async def test_a_plan_is_inflated_where_it_comes_deflated() -> None:
    plan = bytes(range(256)) + 2000 * b"a"
    deflated = zlib.compress(plan)
    assert await plan_of(deflated) == (plan, len(deflated), ["deflate"])
    assert (await plan_of(plan, encoding=""))[0] == plan  # an aggregator of before


async def test_of_a_plan_no_more_is_inflated_than_a_plan_may_have() -> None:
    found, down, _ = await plan_of(zlib.compress(bytes(64 * MAX_PLAN_BYTES)))
    assert found is not None
    assert (len(found), down < MAX_PLAN_BYTES) == (MAX_PLAN_BYTES + 1, True)  # which no reader of plans takes


@pytest.mark.parametrize("body", [b"", b"no stream", zlib.compress(b"plan")[:-1], zlib.compress(b"plan") + b"x"])
async def test_a_stream_that_is_none_is_no_answer(body: bytes) -> None:
    with pytest.raises(TransportError, match="answered with no plan: "):
        await plan_of(body)
