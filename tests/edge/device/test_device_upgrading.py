"""A home of an older version, in the clear, is encrypted in place and goes on as the same device.

Invariant: at every instant of it each file is there, in the one form or the other; nothing that waits is lost, and the
update that was journaled is sent with the very bytes it had.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from device_bench import Bench

from edge_runtime.at_rest import is_encrypted
from edge_runtime.device import events
from edge_runtime.device.commands import rotate_key, status, trust
from edge_runtime.device.display import encrypted_line
from edge_runtime.device.errors import StorageKeyError
from edge_runtime.device.files import write_record
from edge_runtime.device.home import Home
from edge_runtime.device.opening import opened
from edge_runtime.device.outbox import Outbox, first_round
from edge_runtime.device.records import Identity
from edge_runtime.device.storage_key import KeyChoice, default_file
from tests.edge.encrypted import tensors_in

CLEAR = {"residual.encrypted": "residual.safetensors", "personal.encrypted": "personal.safetensors"}
UNSENT = {"sealed": "update", "residual": "residual", "personal": "personal"}


class KilledError(Exception):
    """The process is gone at this instant."""


async def waiting(bench: Bench, *, codes: bool) -> dict[str, bytes]:
    """A device that counted in round 0 and whose update of round 1 waits; the plain bytes of what it keeps, by name."""
    bench.aggregator.rounds = 4
    if codes:
        from edge_runtime.wire import Quantisation

        bench.aggregator.quantisation = Quantisation(4, (1.4, 1.4))
    else:
        bench.aggregator.personal = ("B",)
    bench.aggregator.plans.clear()
    bench.aggregator._open()
    bench.trainer.rng = np.random.default_rng(2)
    await bench.run(once=True)
    bench.aggregator.faults.away_for = {"PUT"}
    bench.stop_at(events.Waiting)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    bench.aggregator.faults.away_for, bench.on_event = set(), None
    vault, home = bench.home.vault(), bench.home
    kept = {
        name: vault.read(home.folder / name, name.partition(".")[0]) for name in CLEAR if (home.folder / name).exists()
    }  # type: ignore[arg-type]
    for path in home.outbox.iterdir():
        purpose = {**UNSENT, "record": "record"}[path.suffix[1:]]
        kept[path.name] = vault.read(path, purpose)  # type: ignore[arg-type]
    assert len(kept) == 4
    return kept


def make_old(home: Home, kept: dict[str, bytes], identity: Identity) -> None:
    """Write the home as the version before did: names and bytes are what that one had."""
    for name, data in kept.items():
        folder = home.outbox if name.startswith("round-") else home.folder
        (folder / name).unlink()
        old = CLEAR.get(name) or name.replace(".record", ".json")
        (folder / old).write_bytes(data)
    write_record(home.folder / "identity.json", identity)
    (home.folder / "storage.json").unlink(missing_ok=True)
    (home.folder / "remembered.hidden").write_bytes(b"embhid1\n" + bytes(100))
    default_file(home.folder).unlink(missing_ok=True)


def names(home: Home) -> set[str]:
    return {str(path.relative_to(home.folder)) for path in home.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("codes", [False, True])
async def test_it_goes_on_as_the_same_device(bench: Bench, codes: bool) -> None:
    kept, identity = await waiting(bench, codes=codes), bench.home.identity()
    make_old(bench.home, kept, identity)
    old = names(bench.home)
    said: list[events.DeviceEvent] = []
    with opened(bench.home.folder, KeyChoice(), said.append) as home:
        pass
    key = default_file(home.folder)
    assert said == [events.Encrypted(files=5, key=f"file {key}")]
    assert home.identity() == identity
    suffix = "residual" if codes else "personal"
    renamed = {f"{suffix}.safetensors", "outbox/round-1.json", "remembered.hidden"}
    made = {f"{suffix}.encrypted", "outbox/round-1.record", "storage.json"}
    assert names(home) == (old - renamed) | made
    for name in kept:
        folder = home.outbox if name.startswith("round-") else home.folder
        assert is_encrypted((folder / name).read_bytes())
    clear = [*kept.values(), identity.private_key.encode()]
    for path in home.folder.rglob("*"):
        if path.is_file():
            assert not [data for data in clear if data in path.read_bytes()], path
    # A second opening changes nothing and says nothing.
    with opened(bench.home.folder, KeyChoice(), said.append):
        assert len(said) == 1
    bench.home, trained = home, list(bench.trainer.calls)
    await bench.run(once=True)
    assert bench.aggregator.received[-1] == (1, "pi-1", kept["round-1.sealed"])
    assert bench.trainer.calls == trained, "trained again"
    now = tensors_in(home.folder / f"{suffix}.encrypted", suffix, home.vault())
    assert sorted(now)
    await bench.run()
    assert bench.of(events.Finished)
    assert bench.home.state().counted == 4


async def test_a_crash_at_every_instant_loses_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, identity = await waiting(bench, codes=False), bench.home.identity()
    instants, found = 0, False
    while not found:
        make_old_again(bench.home, kept, identity)
        with monkeypatch.context() as patch:
            dying = die_at(patch, instants)
            try:
                with opened(bench.home.folder, KeyChoice(), lambda event: None):
                    found = True
            except KilledError:
                pass
        assert dying() or found
        check_nothing_is_missing(bench.home.folder, kept)
        said: list[events.DeviceEvent] = []
        with opened(bench.home.folder, KeyChoice(), said.append) as home:
            assert home.identity() == identity
            check_encrypted(home, kept)
        instants += 1
    assert instants > 15


def make_old_again(home: Home, kept: dict[str, bytes], identity: Identity) -> None:
    """The home as it was before, whatever was made of it."""
    for path in (*home.folder.glob("*.encrypted"), *home.folder.glob("*.partial"), *home.outbox.iterdir()):
        path.unlink()
    for name in kept:
        ((home.outbox if name.startswith("round-") else home.folder) / name).touch()
    make_old(home, kept, identity)


def die_at(patch: pytest.MonkeyPatch, instant: int) -> Callable[[], bool]:
    """Let the process die before its ``instant``-th write, rename or removal; whether it did is what is returned."""
    count = 0

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **more: object) -> object:
            nonlocal count
            count += 1
            if count > instant:
                raise KilledError
            return real(*arguments, **more)

        return step

    for name in ("fsync", "replace", "unlink"):
        patch.setattr(os, name, dying(getattr(os, name)))
    return lambda: count > instant


def check_nothing_is_missing(folder: Path, kept: dict[str, bytes]) -> None:
    """Every file is there, as it was or encrypted; identity.json is whole."""
    for name, data in kept.items():
        old = CLEAR.get(name) or name.replace(".record", ".json")
        places = [place / either for place in (folder, folder / "outbox") for either in (name, old)]
        contents = [place.read_bytes() for place in places if place.exists()]
        assert data in contents or any(is_encrypted(content) for content in contents), name
    assert msgspec.json.decode((folder / "identity.json").read_bytes())["device"] == "pi-1"


def check_encrypted(home: Home, kept: dict[str, bytes]) -> None:
    vault = home.vault()
    assert vault.read(home.personal, "personal") == kept["personal.encrypted"]
    pending = Outbox(home.outbox, vault).first()
    assert pending is not None
    assert Outbox(home.outbox, vault).sealed(pending) == kept["round-1.sealed"]
    assert vault.read(home.outbox / "round-1.personal", "personal", round_=1) == kept["round-1.personal"]
    assert {path.name for path in home.outbox.iterdir()} == {name for name in kept if name.startswith("round-")}


async def test_a_key_that_is_lost_half_way_is_not_replaced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some files need it, though identity.json is still in the clear."""
    kept, identity = await waiting(bench, codes=False), bench.home.identity()
    make_old(bench.home, kept, identity)
    with monkeypatch.context() as patch:
        die_at(patch, 14)
        with pytest.raises(KilledError), opened(bench.home.folder, KeyChoice(), lambda event: None):
            pass
    assert bench.home.identity_form() == "clear"
    assert is_encrypted(bench.home.personal.read_bytes())
    default_file(bench.home.folder).unlink()
    with (
        pytest.raises(StorageKeyError, match="no storage key there"),
        opened(bench.home.folder, KeyChoice(), lambda event: None),
    ):
        pass


async def test_status_reads_an_old_home_and_changes_nothing(bench: Bench) -> None:
    kept, identity = await waiting(bench, codes=False), bench.home.identity()
    make_old(bench.home, kept, identity)
    before = names(bench.home)
    result = CliRunner().invoke(status, ["--home", str(bench.home.folder)])
    assert result.exit_code == 0
    assert "none: 'emberlora edge run' makes one and encrypts the home" in result.stdout
    assert names(bench.home) == before
    assert first_round(bench.home.outbox) is None  # an older version's record is not one of ours
    assert not default_file(bench.home.folder).exists()


async def test_other_commands_upgrade_it_too_and_say_so_once(bench: Bench) -> None:
    kept, identity = await waiting(bench, codes=False), bench.home.identity()
    make_old(bench.home, kept, identity)
    runner, home = CliRunner(), str(bench.home.folder)
    first = runner.invoke(trust, ["--home", home, "--system-ca"])
    assert first.exit_code == 0
    place = default_file(bench.home.folder)
    assert first.stderr == encrypted_line(events.Encrypted(files=5, key=f"file {place}")) + "\n"
    assert "emberlora edge rotate-key" in first.stderr
    assert rotate_key.name == "rotate-key"
    assert runner.invoke(trust, ["--home", home, "--system-ca"]).stderr == ""


async def test_an_enrolment_that_was_not_answered_is_encrypted(bench: Bench) -> None:
    begun = Identity("http://127.0.0.1:1", "pi-2", "ef" * 32)
    folder = bench.home.folder.with_name("begun")
    folder.mkdir()
    write_record(folder / "identity.json", begun)
    said: list[events.DeviceEvent] = []
    with opened(folder, KeyChoice(), said.append, new=True) as home:
        assert home.stored_identity() == begun
    assert said == [events.Encrypted(files=1, key=f"file {default_file(folder)}")]
    assert begun.private_key.encode() not in (folder / "identity.json").read_bytes()


async def test_what_belongs_to_no_update_is_swept_by_the_next_run(bench: Bench) -> None:
    kept, identity = await waiting(bench, codes=False), bench.home.identity()
    make_old(bench.home, kept, identity)
    for name in ("round-x.json", "round-7.sealed", "round-7.json.partial"):
        (bench.home.outbox / name).write_bytes(b"left by a crash")
    with opened(bench.home.folder, KeyChoice(), lambda event: None) as home:
        pass
    bench.home = home
    await bench.run(once=True)
    assert list(home.outbox.iterdir()) == []
    assert bench.of(events.Uploaded)[-1].round == 1
