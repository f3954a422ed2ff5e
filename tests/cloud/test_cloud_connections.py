"""Connections over a bound are closed before a byte of theirs is read; those of other addresses are not touched."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from cloud_fleet import Site

from cloud.http import connections
from cloud.http.connections import source_of_address

HEALTH = b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("127.0.0.1", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
        ("", None),
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_who_is_counted(address: str, source: str | None) -> None:
    assert source_of_address(address) == source


async def site_with(folder: Path, **server: int) -> tuple[Site, int]:
    site = Site.make(folder)
    site.config = msgspec.structs.replace(site.config, server=msgspec.structs.replace(site.config.server, **server))
    running = await site.start()
    return site, int(running.url.rpartition(":")[2])


async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Whether the server answers; it may have closed the connection already."""
    try:
        writer.write(HEALTH)
        return (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


async def test_all_connections_together_have_a_bound(tmp_path: Path) -> None:
    """Two that say nothing are as many as there may be; once one of them hangs up there is room again."""
    site, port = await site_with(tmp_path, max_connections=2, max_connections_per_address=1)
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    assert await served(*idle[0])  # of this machine, one address may have more than one
    one = await asyncio.open_connection("127.0.0.1", port)
    assert not await served(*one)
    assert await served(*idle[1])
    idle[0][1].close()
    for _ in range(1000):
        another = await asyncio.open_connection("127.0.0.1", port)
        if await served(*another):
            break
        another[1].close()
        await asyncio.sleep(0.01)
    else:
        raise AssertionError("there was no room again")
    for _, writer in (*idle, one, another):
        writer.close()
    await site.close()


async def test_an_address_has_a_bound_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses are made up: a connection's source port says which it is from."""
    addresses: dict[int, str] = {}

    def address(transport: asyncio.BaseTransport) -> str:
        port = transport.get_extra_info("peername")[1]
        if port not in addresses:
            addresses[port] = next(order)
        return addresses[port]

    monkeypatch.setattr(connections, "_address", address)
    order = iter(["192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2"])
    site, port = await site_with(tmp_path, max_connections=8, max_connections_per_address=2)
    opened = []
    answers = []
    for _ in range(4):
        opened.append(await asyncio.open_connection("127.0.0.1", port))
        answers.append(await served(*opened[-1]))
    assert answers == [True, True, False, True]
    for _, writer in opened:
        writer.close()
    await site.close()
