"""Enrolment: the key is the device's own, the server proves itself by the token, a lost answer is repaired."""

from __future__ import annotations

import hashlib
import logging
import stat
from pathlib import Path

import pytest
from device_bench import Bench
from device_server import TASK, Aggregator

from edge_runtime import wire
from edge_runtime.device.enrolment import enrol, leave
from edge_runtime.device.errors import EnrolledError, InputError, NotEnrolledError, PinMismatchError, TransportError
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from edge_runtime.device.trust import check_server
from tests.edge.encrypted import KEY


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", KEY)


async def test_enrolment_pins_the_servers_key(aggregator: Aggregator, home: Home) -> None:
    token = aggregator.token("pi-1")
    identity = await enrol(home, server=aggregator.url, token=token, device="pi-1", host=Host())
    assert (identity.device, identity.task, identity.server) == ("pi-1", TASK, aggregator.url)
    assert hashlib.sha256(bytes.fromhex(identity.plan_key)).hexdigest() == token.fingerprint
    assert home.identity() == identity
    assert stat.S_IMODE((home.folder / "identity.json").stat().st_mode) == 0o600


async def test_a_wrong_fingerprint_is_refused(aggregator: Aggregator, home: Home) -> None:
    token = wire.Token(aggregator.token("pi-1").secret, "0" * 64)
    with pytest.raises(PinMismatchError, match="another fingerprint; nothing was enrolled"):
        await enrol(home, server=aggregator.url, token=token, device="pi-1", host=Host())
    with pytest.raises(NotEnrolledError):
        home.identity()


async def test_a_lost_answer_is_repaired_with_the_same_key(aggregator: Aggregator, home: Home) -> None:
    token = aggregator.token("pi-1")
    aggregator.faults.deaf = 1
    with pytest.raises(TransportError):
        await enrol(home, server=aggregator.url, token=token, device="pi-1", host=Host())
    enrolled_key = aggregator.devices["pi-1"]
    await enrol(home, server=aggregator.url, token=token, device="pi-1", host=Host())
    assert aggregator.devices["pi-1"] == enrolled_key


async def test_a_used_token_is_refused_for_another_device(aggregator: Aggregator, home: Home, tmp_path: Path) -> None:
    token = aggregator.token("pi-1")
    await enrol(home, server=aggregator.url, token=token, device="pi-1", host=Host())
    with pytest.raises(wire.TokenError):
        await enrol(Home(tmp_path / "thief", KEY), server=aggregator.url, token=token, device="pi-1", host=Host())


async def test_an_enrolled_home_is_not_enrolled_again(bench: Bench) -> None:
    aggregator = bench.aggregator
    before = bench.home.identity()
    with pytest.raises(EnrolledError, match="already enrolled as pi-1 in task docs"):
        await enrol(bench.home, server=aggregator.url, token=aggregator.token("pi-2"), device="pi-2", host=Host())
    assert bench.home.identity() == before


async def test_the_operators_name_is_not_for_devices(home: Home) -> None:
    with pytest.raises(InputError, match="operator"):
        await enrol(home, server="http://127.0.0.1:1", token=wire.Token("", ""), device="operator", host=Host())
    assert not home.folder.exists()


async def test_leaving_forgets_on_both_sides_and_keeps_downloads(bench: Bench) -> None:
    await bench.run()
    await leave(bench.home, host=Host())
    assert bench.aggregator.devices == {}
    with pytest.raises(NotEnrolledError):
        bench.home.identity()
    assert bench.home.state().seen_round == -1
    assert (bench.home.published_folder / "adapter_model.safetensors").exists()


async def test_leaving_a_server_that_has_forgotten_already(bench: Bench) -> None:
    bench.aggregator.devices.clear()
    await leave(bench.home, host=Host())
    assert bench.home.stored_identity() is None


async def test_leaving_a_server_that_is_away_changes_nothing(bench: Bench) -> None:
    bench.aggregator.faults.away = True
    before = bench.home.identity()
    with pytest.raises(TransportError):
        await leave(bench.home, host=Host())
    assert bench.home.identity() == before


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://ember.example:8440", "https://ember.example:8440"),
        ("https://ember.example/", "https://ember.example"),
        ("http://127.0.0.1:8440", "http://127.0.0.1:8440"),
        ("http://localhost:1", "http://localhost:1"),
        ("http://[::1]:8440", "http://[::1]:8440"),
    ],
)
def test_good_addresses(url: str, origin: str) -> None:
    assert check_server(url) == origin


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://ember.example", "plain http leaves this machine"),
        ("http://127.0.0.1.evil.example", "plain http"),
        ("ftp://ember.example", "expected an address like"),
        ("ember.example:8440", "expected an address like"),
        ("https://ember.example/prefix", "nothing after it"),
        ("https://me:secret@ember.example", "expected an address like"),
        ("https://ember.example:99999", "port"),
    ],
)
def test_bad_addresses(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_server(url)


def test_plain_http_elsewhere_when_the_user_says_so() -> None:
    assert check_server("http://ember.example:80", insecure_http=True) == "http://ember.example:80"


async def test_secrets_are_in_no_repr_and_no_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = bench.aggregator.token("pi-9")
    home = Home(bench.home.folder.with_name("other"), KEY)
    identity = await enrol(home, server=bench.aggregator.url, token=token, device="pi-9", host=Host())
    await bench.run()
    said = repr(identity) + str(identity) + repr(token) + caplog.text + repr(bench.seen)
    for secret in (identity.private_key, bench.home.identity().private_key, token.secret, str(token)):
        assert secret not in said
