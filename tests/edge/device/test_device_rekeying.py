"""A device replaces its key: whatever is lost on the way, it gets in with one of the two it has."""

from __future__ import annotations

import stat

import msgspec
import pytest
from click.testing import CliRunner
from device_bench import Bench

from edge_runtime import wire
from edge_runtime.device import events, rekeying
from edge_runtime.device.commands import rotate_key
from edge_runtime.device.enrolment import leave
from edge_runtime.device.errors import TransportError
from edge_runtime.device.host import Host
from edge_runtime.device.records import Identity
from edge_runtime.device.rekeying import rotate


def public(identity: Identity) -> str:
    return identity.signing_key().public_key().public_bytes_raw().hex()


async def test_the_new_key_counts_and_the_old_one_is_refused(bench: Bench) -> None:
    before = bench.home.identity()
    after = await rotate(bench.home, host=Host())
    assert (bench.home.identity(), after.pending_key) == (after, "")
    assert bench.aggregator.devices["pi-1"] == public(after) != public(before)
    await bench.run()
    assert bench.of(events.Finished)


async def test_it_is_on_disk_before_it_is_sent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a kill at any later instant leaves it there, for its owner only, and the old one too."""
    before = bench.home.identity()

    async def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rekeying.Client, "rekey", killed)
    with pytest.raises(KeyboardInterrupt):
        await rotate(bench.home, host=Host())
    kept = bench.home.identity()
    assert (kept.private_key, len(kept.pending_key)) == (before.private_key, 64)
    assert stat.S_IMODE((bench.home.folder / "identity.json").stat().st_mode) == 0o600
    assert kept.pending_key not in repr(kept)


@pytest.mark.parametrize("then", ["rotate", "run", "leave"])
@pytest.mark.parametrize("arrived", [True, False])
async def test_a_lost_request_or_answer_is_settled_by_what_comes_next(bench: Bench, then: str, arrived: bool) -> None:
    if arrived:
        bench.aggregator.faults.deaf = 1
    else:
        bench.aggregator.faults.away = True
    with pytest.raises(TransportError):
        await rotate(bench.home, host=Host())
    bench.aggregator.faults.away = False
    pending = bench.home.identity().pending_key
    new = public(Identity("", "", pending))
    assert (bench.aggregator.devices["pi-1"] == new) == arrived
    if then == "leave":
        await leave(bench.home, host=Host())
        assert bench.aggregator.devices == {}
        return
    await (bench.run() if then == "run" else rotate(bench.home, host=Host()))
    after = bench.home.identity()
    assert (after.private_key, after.pending_key) == (pending, "")
    assert bench.aggregator.devices["pi-1"] == new


async def test_run_waits_for_a_server_that_is_away_with_a_key_pending(bench: Bench) -> None:
    home = bench.home
    home.save_identity(msgspec.structs.replace(home.identity(), pending_key="ab" * 32))
    bench.aggregator.faults.away = True

    def back(event: events.DeviceEvent) -> None:
        if isinstance(event, events.Waiting):
            bench.aggregator.faults.away = False

    bench.on_event = back
    await bench.run()
    assert bench.of(events.Finished)
    assert home.identity().private_key == "ab" * 32


async def test_a_refused_key_is_forgotten_and_the_old_one_goes_on(bench: Bench) -> None:
    home = bench.home
    pending = msgspec.structs.replace(home.identity(), pending_key="ab" * 32)
    bench.aggregator.retired.add(public(Identity("", "", "ab" * 32)))
    home.save_identity(pending)
    with pytest.raises(wire.NotPermittedError):
        await rotate(home, host=Host())
    assert home.identity() == msgspec.structs.replace(pending, pending_key="")
    home.save_identity(pending)
    await bench.run()
    assert bench.of(events.Finished)


async def test_a_server_from_before_this_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the new key is kept: its answer does not show which of the two counts."""

    async def unknown(*_: object) -> None:
        raise wire.NotFoundError("no such resource")

    before = bench.home.identity()
    monkeypatch.setattr(rekeying.Client, "rekey", unknown)
    with pytest.raises(wire.NotFoundError):
        await rotate(bench.home, host=Host())
    await bench.run()
    assert bench.of(events.Finished)
    kept = bench.home.identity()
    assert (kept.private_key, bool(kept.pending_key)) == (before.private_key, True)


def test_the_command_on_a_home_without_a_key(tmp_path) -> None:
    result = CliRunner().invoke(rotate_key, ["--home", str(tmp_path / "none")])
    assert (result.exit_code, "not enrolled" in result.stderr) == (2, True)
