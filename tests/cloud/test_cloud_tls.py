"""A server with a certificate: what it refuses to start with, whom it talks to, and that the operator pins it."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path

import aiohttp
import msgspec
import pytest
from click.testing import CliRunner
from cloud_fleet import Site

from cloud.commands import cloud
from cloud.config import Config
from cloud.errors import ConfigError, ServerAbsentError
from cloud.operator import PIN_NAME
from cloud.tls import server_context
from edge_runtime import wire
from edge_runtime.device.client import Client
from edge_runtime.device.enrolment import Trust, enrol
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from tests.certificates import Authority
from tests.edge.encrypted import KEY


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def with_tls(config: Config, certificate: Path, key: Path) -> Config:
    server = msgspec.structs.replace(config.server, tls_cert=str(certificate), tls_key=str(key))
    return msgspec.structs.replace(config, server=server)


@pytest.fixture
async def secure(tmp_path: Path, authority: Authority):
    """A site that speaks https, its certificate for another name than its address."""
    site = Site.make(tmp_path)
    site.clock.now = time.time()
    site.config = with_tls(site.config, *authority.issue(tmp_path / "tls", "ember.example"))
    await site.start()
    yield site
    await site.close()


async def test_it_speaks_tls_and_nothing_older_than_1_2(secure: Site, authority: Authority) -> None:
    assert secure.server.url.startswith("https://127.0.0.1:")
    context = ssl.create_default_context(cadata=authority.pem)
    async with aiohttp.ClientSession() as session:
        url = secure.server.url + "/v1/health"
        async with session.get(url, ssl=context, server_hostname="ember.example") as response:
            assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await session.get(url.replace("https", "http"))
    assert server_context(secure.config).minimum_version == ssl.TLSVersion.TLSv1_2


async def test_the_operators_commands_pin_its_certificate(secure: Site, authority: Authority, tmp_path: Path) -> None:
    """Whatever name is in it; and they go on when the files were replaced and the server has not read them yet."""
    assert (await secure.operator.status()).task == "tiny"
    authority.issue(tmp_path / "tls", "ember.example")
    assert (await secure.operator.make_token("one", 60)).device == "one"
    command = ["token", "--config", str(secure.folder), "--device", "two"]
    assert (await asyncio.to_thread(CliRunner().invoke, cloud, command)).exit_code == 0
    pin = secure.config.data_path / PIN_NAME
    pin.write_text("00" * 32)
    with pytest.raises(ServerAbsentError, match="another server answers there: its certificate is not the"):
        await secure.operator.status()
    await secure.close()
    assert not pin.exists()


async def test_a_device_enrols_over_tls(tmp_path: Path, authority: Authority) -> None:
    site = Site.make(tmp_path)
    site.clock.now = time.time()
    site.config = with_tls(site.config, *authority.issue(tmp_path / "tls", "127.0.0.1"))
    server, home = await site.start(), Home(tmp_path / "home", KEY)
    try:
        token = wire.Token.parse((await site.operator.make_token("one", 60)).token)
        trust = Trust(authority.pem)
        await enrol(home, server=server.url, token=token, device="one", host=Host(), trust=trust)
        async with Client.of(home.identity(), Host()) as client:
            assert (await client.plan("tiny", after=-1, wait_s=1)).data
        await site.operator.revoke("one")
        async with Client.of(home.identity(), Host()) as client:
            with pytest.raises(wire.DeviceRevokedError):
                await client.plan("tiny", after=-1, wait_s=1)
    finally:
        await site.close()


@pytest.mark.parametrize(
    ("certificate", "key", "message"),
    [
        ("none.pem", "a/key.pem", r"server.tls_cert: .*none.pem: cannot be read: No such file"),
        ("a/key.pem", "a/key.pem", r"server.tls_cert: .*key.pem: holds no certificate in PEM form"),
        ("a/cert.pem", "none.pem", r"server.tls_key: .*none.pem: cannot be read: No such file"),
        ("a/cert.pem", "b/key.pem", r"server.tls_key: .*belongs to .*cert.pem \(KEY_VALUES_MISMATCH\)"),
        ("a/cert.pem", "locked.pem", r"server.tls_key: .*locked.pem: not an unencrypted key in PEM form"),
    ],
)
def test_unusable_files_are_one_clear_line(
    certificate: str, key: str, message: str, authority: Authority, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization as s

    site = Site.make(tmp_path / "site")
    for name in "ab":
        authority.issue(tmp_path / name, "127.0.0.1")
    locked = authority.key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"x"))
    (tmp_path / "locked.pem").write_bytes(locked)
    with pytest.raises(ConfigError, match=message) as caught:
        server_context(with_tls(site.config, tmp_path / certificate, tmp_path / key))
    assert "\n" not in str(caught.value)


def test_the_command_takes_files_from_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that is not this machine's needs no other permission then; one file of two is not enough."""
    site = Site.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = ["serve", "--config", str(site.folder), "--host", "0.0.0.0", "--tls-cert", "c.pem"]
    both = CliRunner().invoke(cloud, [*options, "--tls-key", "k.pem"])
    assert (both.exit_code, f"server.tls_cert: {tmp_path / 'c.pem'}: cannot be read" in both.stderr) == (2, True)
    one = CliRunner().invoke(cloud, options)
    assert (one.exit_code, "server.tls_cert and server.tls_key: give both or neither" in one.stderr) == (2, True)
