"""What the operator's commands do when the server breaks off."""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path

import pytest

from cloud.errors import ServerAbsentError
from cloud.keys import load_keys, make_keys
from cloud.operator import OperatorClient


async def test_a_broken_connection_is_told_and_not_taken_for_a_replay(tmp_path: Path) -> None:
    """aiohttp repeated the request with the same nonce, and the operator read of a signature."""
    heads: list[bytes] = []

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.close()
        await writer.wait_closed()

    make_keys(tmp_path)
    async with await asyncio.start_server(break_off, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = OperatorClient(
            f"http://127.0.0.1:{port}", load_keys(tmp_path), clock=time.time, entropy=secrets.token_bytes
        )
        with pytest.raises(ServerAbsentError, match="no aggregator answers"):
            await client.status()
    assert len(heads) == 1
