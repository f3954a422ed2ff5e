"""What a client makes of a connection that breaks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.device.client import Client, Signer
from edge_runtime.device.errors import TransportError
from edge_runtime.device.host import Host
from edge_runtime.device.outbox import pending_for


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
