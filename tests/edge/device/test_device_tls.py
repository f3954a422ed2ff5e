"""A device and certificates: which it believes, what it says of others, and that it does not wait for those."""

from __future__ import annotations

import ssl
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from device_bench import Bench
from device_bundle import TinyBundle
from device_server import Aggregator, Serving

from edge_runtime.device import events
from edge_runtime.device.commands import enroll, trust
from edge_runtime.device.enrolment import Trust, enrol, leave
from edge_runtime.device.errors import InputError, TransportError, UntrustedServerError
from edge_runtime.device.files import write_bytes
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from edge_runtime.device.records import Identity
from edge_runtime.device.storage_key import default_file
from edge_runtime.device.trust import read_ca, tls_of
from tests.certificates import Authority
from tests.edge.encrypted import KEY

OTHER_CA = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    write_bytes(default_file(tmp_path / "home"), KEY.text().encode())  # where commands look for it
    return Home(tmp_path / "home", KEY)


async def join(home: Home, aggregator: Aggregator, ca: str) -> Identity:
    token = aggregator.token("pi-1")
    return await enrol(home, server=aggregator.url, token=token, device="pi-1", host=Host(), trust=Trust(ca))


def ca_of(path: Path, text: str) -> str:
    path.write_text(text)
    return read_ca(path)


async def test_a_task_over_tls(home: Home, tiny_bundle: TinyBundle, authority: Authority, tmp_path: Path) -> None:
    """The CA stays with the identity, readable by its owner only; the file it came from may go."""
    ca = ca_of(tmp_path / "ca.pem", authority.pem)
    (tmp_path / "ca.pem").unlink()
    async with Serving(Aggregator(tiny_bundle), tls=authority.serving(tmp_path, "127.0.0.1")) as aggregator:
        assert aggregator.url.startswith("https://")
        await join(home, aggregator, ca)
        bench = Bench(home, aggregator)
        await bench.run()
        assert bench.of(events.Finished)
        assert Home(home.folder, KEY).identity().ca == authority.pem
        await leave(home, host=Host())


async def test_the_servers_own_certificate_may_be_its_ca(
    home: Home, tiny_bundle: TinyBundle, authority: Authority, tmp_path: Path
) -> None:
    tls = authority.serving(tmp_path, "127.0.0.1")
    async with Serving(Aggregator(tiny_bundle), tls=tls) as aggregator:
        assert (await join(home, aggregator, read_ca(tmp_path / "cert.pem"))).enrolled


@pytest.mark.parametrize(
    ("ca", "host", "days", "why"),
    [
        ("system", "127.0.0.1", (-1, 1), "unable to get local issuer certificate"),
        ("other", "127.0.0.1", (-1, 1), "unable to get local issuer certificate|signature failure"),
        ("own", "ember.example", (-1, 1), "IP address mismatch, certificate is not valid for '127.0.0.1'"),
        ("own", "127.0.0.1", (-3, -1), "certificate has expired"),
    ],
)
async def test_a_wrong_certificate_is_one_line_and_not_waited_for(
    ca: str, host: str, days: tuple[int, int], why: str, home: Home, tiny_bundle: TinyBundle, tmp_path: Path
) -> None:
    authority = Authority()
    text = {"system": "", "other": Authority().pem, "own": authority.pem}[ca]
    async with Serving(Aggregator(tiny_bundle), tls=authority.serving(tmp_path, host, days=days)) as aggregator:
        with pytest.raises(
            UntrustedServerError, match=f"https://127.*: {why}.*: correct it there, or .*--ca"
        ) as caught:
            await join(home, aggregator, text)
        assert "\n" not in str(caught.value)
        identity = home.stored_identity()
        home.save_identity(msgspec.structs.replace(identity, task="docs", plan_key="ab" * 32))
        bench = Bench(home, aggregator)
        with pytest.raises(UntrustedServerError):
            await bench.run()
        assert (bench.slept, aggregator.requests) == ([], [])


async def test_a_certificate_from_the_future_is_waited_for(
    home: Home, tiny_bundle: TinyBundle, authority: Authority, tmp_path: Path
) -> None:
    """The clock of a board without a battery is behind until the network has set it."""
    tls = authority.serving(tmp_path, "127.0.0.1", days=(1, 2))
    async with Serving(Aggregator(tiny_bundle), tls=tls) as aggregator:
        with pytest.raises(TransportError, match="not yet valid: is this device's clock right"):
            await join(home, aggregator, authority.pem)


async def test_https_to_a_server_that_speaks_http(home: Home, aggregator: Aggregator, authority: Authority) -> None:
    aggregator.url = aggregator.url.replace("http:", "https:")
    with pytest.raises(UntrustedServerError, match=r"does not speak TLS 1\.2 or newer: is its address right"):
        await join(home, aggregator, authority.pem)


async def test_another_ca_after_a_failure_keeps_the_key(
    home: Home, tiny_bundle: TinyBundle, authority: Authority, tmp_path: Path
) -> None:
    tls = authority.serving(tmp_path, "127.0.0.1")
    async with Serving(Aggregator(tiny_bundle), tls=tls) as aggregator:
        with pytest.raises(UntrustedServerError):
            await join(home, aggregator, "")
        before = home.stored_identity()
        assert (await join(home, aggregator, authority.pem)).private_key == before.private_key


def test_files_that_are_no_ca(authority: Authority, tmp_path: Path) -> None:
    _, key = authority.issue(tmp_path, "127.0.0.1")
    for text, why in (
        ("", "holds no certificate in PEM form"),
        (OTHER_CA, "holds no certificate in PEM form"),
        (authority.pem + key.read_text(), "holds a private key"),
        (authority.pem * 1000, "expected at most 262144 bytes"),
    ):
        with pytest.raises(InputError, match=why):
            ca_of(tmp_path / "ca.pem", text)
    assert ca_of(tmp_path / "ca.pem", "# größer als nötig\n" + authority.pem) == authority.pem


def test_plain_http_elsewhere_needs_what_was_said_at_enrolment() -> None:
    allowed = Identity("http://ember.example:80", "pi-1", "ab" * 32, insecure_http=True)
    assert tls_of(allowed) is None
    with pytest.raises(InputError, match="use https, or say --insecure-http to 'emberlora edge trust'"):
        tls_of(msgspec.structs.replace(allowed, insecure_http=False))
    old = tls_of(msgspec.structs.replace(allowed, server="https://ember.example", insecure_http=False))
    assert old.minimum_version == ssl.TLSVersion.TLSv1_2


def test_the_command_changes_the_ca_of_an_enrolled_device(home: Home, authority: Authority, tmp_path: Path) -> None:
    def types(command: object, *options: object):
        return CliRunner().invoke(command, [str(option) for option in ("--home", home.folder, *options)])

    ca = tmp_path / "ca.pem"
    ca.write_text(authority.pem)
    assert types(trust, "--ca", ca).exit_code == 2  # not enrolled
    home.save_identity(Identity("https://ember.example", "pi-1", "ab" * 32, "docs", "cd" * 32))
    assert types(trust, "--ca", ca).stdout == f"pi-1 trusts {ca} for https://ember.example\n"
    assert home.identity().ca == authority.pem
    assert types(trust, "--system-ca").exit_code == 0
    assert home.identity().ca == ""
    assert types(trust, "--insecure-http").exit_code == 0
    assert home.identity().insecure_http
    assert types(trust).exit_code == types(trust, "--system-ca", "--ca", ca).exit_code == 2
    token = "ember1." + "A" * 64
    plain = types(enroll, "--server", "http://127.0.0.1:1", "--name", "a", "--token", token, "--ca", ca)
    assert (plain.exit_code, "--ca is for https" in plain.stderr) == (2, True)
