"""Parameters that never leave a device. Invariant: what a home keeps is what its acknowledged rounds have made of the
published tensors, each of them once, whatever was refused, lost or interrupted in between; and nobody else has it."""

from __future__ import annotations

import asyncio
import json
import stat

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from device_bench import Bench
from device_bundle import MODULES
from device_server import Aggregator

from edge_runtime.at_rest import StorageKey
from edge_runtime.bundle import Array, encode_tensors, parse_tensors, read_peft_folder
from edge_runtime.device import events
from edge_runtime.device.commands import status
from edge_runtime.device.display import TerminalDisplay
from edge_runtime.device.errors import StorageKeyError
from edge_runtime.device.home import Home
from edge_runtime.device.outbox import Outbox
from tests.edge.encrypted import tensors_in, vault_of, write_tensors_to

NAMES = [f"{module}.lora_b" for module in MODULES]


@pytest.fixture
def own(bench: Bench) -> Bench:
    """A bench whose aggregator leaves B to the devices for four rounds."""
    plan_personal(bench.aggregator)
    return bench


def plan_personal(aggregator: Aggregator, *, rounds: int = 4) -> None:
    aggregator.rounds, aggregator.personal = rounds, ("B",)
    aggregator.plans.clear()
    aggregator._open()


def published(bench: Bench) -> dict[str, Array]:
    return parse_tensors(bench.aggregator.bundle.adapter, what="adapter")


def check_kept(bench: Bench, rounds: int) -> None:
    """The stand-in adds 0.5 a training."""
    kept, before = tensors_in(bench.home.personal, "personal", bench.home.vault()), published(bench)
    assert sorted(kept) == sorted(NAMES)
    for name in NAMES:
        np.testing.assert_allclose(kept[name], before[name] + 0.5 * rounds, atol=1e-6)


async def test_rounds_add_up_and_the_users_adapter_has_them(own: Bench) -> None:
    await own.run()
    check_kept(own, 4)
    assert own.of(events.Finished)
    assert {event.personal for event in own.of(events.Planned)} == {("B",)}
    mine = read_peft_folder(own.home.published_folder, own.aggregator.bundle.manifest)
    theirs = parse_tensors(own.aggregator.blobs[own.aggregator.adapter], what="adapter")
    kept = tensors_in(own.home.personal, "personal", own.home.vault())
    for name, array in mine.items():
        np.testing.assert_array_equal(array, kept[name] if name in NAMES else theirs[name])
    for name in NAMES:  # the shared file knows nothing of it
        np.testing.assert_array_equal(theirs[name], published(own)[name])


async def test_a_refused_update_takes_its_personal_part_with_it(own: Bench) -> None:
    await own.run(once=True)
    own.aggregator.faults.close_before_upload = True
    await own.run(once=True)
    assert [event.reason for event in own.of(events.Skipped)] == ["round-closed"]
    check_kept(own, 1)
    assert list(own.home.outbox.iterdir()) == []
    await own.run()
    check_kept(own, 3)


async def test_staying_out_of_a_round_keeps_nothing(own: Bench) -> None:
    own.trainer.weight = 0  # few examples
    await own.run(once=True)
    assert not own.home.personal.exists()


async def test_an_answer_that_is_lost_counts_once(own: Bench) -> None:
    await own.run(once=True)
    own.aggregator.faults.deaf = 1
    own.stop_at(events.Waiting)
    with pytest.raises(asyncio.CancelledError):
        await own.run()
    check_kept(own, 1)
    assert (own.home.outbox / "round-1.personal").exists()
    own.on_event = None
    await own.run()
    assert own.trainer.calls == [0, 1, 2, 3]
    check_kept(own, 4)


class KilledError(Exception):
    """The process is gone at this instant."""


def die(*_: object, **__: object) -> None:
    raise KilledError


@pytest.mark.parametrize(
    ("owner", "step", "trainings"),
    [
        (Outbox, "add", 5),  # trained, nothing is durable: trained again, from what it was
        (Outbox, "keep_carried", 4),  # acknowledged, the file has not moved
        (Home, "save_state", 4),  # it has moved, the state does not say that the round is done
        (Outbox, "remove", 4),  # the state says so, the journal is still there
    ],
)
async def test_a_crash_at_any_step_neither_loses_nor_doubles(
    own: Bench, monkeypatch: pytest.MonkeyPatch, owner: type, step: str, trainings: int
) -> None:
    await own.run(once=True)
    state, real = own.home.state(), Home.save_state

    def later(self: Home, new: object) -> None:
        """Only the state that ends round 1 is not written; those before it are."""
        if getattr(new, "done_round", 0) > state.done_round:
            die()
        real(self, new)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, later if step == "save_state" else die)
        with pytest.raises(KilledError):
            await own.run()
    await own.run()
    assert len(own.trainer.calls) == trainings
    check_kept(own, 4)
    assert list(own.home.outbox.iterdir()) == []


async def test_a_round_without_personal_parts_leaves_the_file(own: Bench) -> None:
    await own.run(once=True)
    before = own.home.personal.read_bytes()
    own.aggregator.personal = ()
    own.aggregator.plans.pop()
    own.aggregator._open()
    await own.run(once=True)
    assert own.home.personal.read_bytes() == before


@pytest.mark.parametrize("damage", ["rot", "shape"])
async def test_a_file_that_does_not_fit_is_told_and_the_published_part_stands(own: Bench, damage: str) -> None:
    """At the end, where the user's adapter is written."""
    await own.run(limit_s=10)
    state = own.home.state()
    own.home.save_state(msgspec.structs.replace(state, finished=False, done_round=3, published=""))
    tensors = tensors_in(own.home.personal, "personal", own.home.vault())
    bad = encode_tensors({**tensors, NAMES[0]: np.ones((10, 1), np.float32)}) if damage == "shape" else b"rot" * 100
    own.home.personal.write_bytes(bad if damage == "rot" else own.home.vault().encrypt(bad, "personal"))
    own.seen.clear()
    await own.run()
    told = [event.text for event in own.of(events.Noticed)]
    assert len(told) == 1
    assert ("where shapes changed: " + NAMES[0] if damage == "shape" else "is lost and starts again") in told[0]
    mine = read_peft_folder(own.home.published_folder, own.aggregator.bundle.manifest)
    np.testing.assert_array_equal(mine[NAMES[0]], published(own)[NAMES[0]])
    np.testing.assert_array_equal(mine[NAMES[1]], tensors[NAMES[1]] if damage == "shape" else published(own)[NAMES[1]])


async def test_a_file_under_another_storage_key_is_kept_and_told(own: Bench) -> None:
    """At the end, where the user's adapter is written: one without what the device kept would not be the device's."""
    await own.run()
    state = own.home.state()
    own.home.save_state(msgspec.structs.replace(state, finished=False, done_round=3, published=""))
    write_tensors_to(own.home.personal, "personal", {}, vault_of(task="docs", key=StorageKey(bytes(32))))
    before = own.home.personal.read_bytes()
    with pytest.raises(
        StorageKeyError, match=r"personal.encrypted: encrypted under another storage key: .*nothing was"
    ):
        await own.run()
    assert own.home.personal.read_bytes() == before
    assert not own.home.state().finished


async def test_only_the_owner_reads_it_and_leaving_removes_it(own: Bench) -> None:
    own.aggregator.faults.away_for = {"PUT"}
    own.stop_at(events.Waiting)
    with pytest.raises(asyncio.CancelledError):
        await own.run()
    assert stat.S_IMODE((own.home.outbox / "round-0.personal").stat().st_mode) == 0o600
    own.aggregator.faults.away_for, own.on_event = set(), None
    await own.run(once=True)
    assert stat.S_IMODE(own.home.personal.stat().st_mode) == 0o600
    own.home.forget()
    assert not own.home.personal.exists()


async def test_the_user_is_told_what_stays_here(own: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    display = TerminalDisplay()
    await own.run()
    for event in own.seen:
        display.show(event)
    assert capsys.readouterr().out.count("trained on this device and never sent: factor B\n") == 1
    found = CliRunner().invoke(status, ["--home", str(own.home.folder), "--json"])
    assert json.loads(found.output)["personal"] == str(own.home.personal)
    assert str(own.home.personal) in CliRunner().invoke(status, ["--home", str(own.home.folder)]).output
