"""What a quantised update leaves out. Invariant: a device's residual is that of its last acknowledged update, whatever
was refused, lost or interrupted in between, so that what it sent and what it still owes add up to what it learned."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import numpy as np
import pytest
from device_bench import Bench
from device_bundle import MODULES
from device_server import Aggregator

from edge_runtime import wire
from edge_runtime.device import events
from edge_runtime.device.files import write_bytes
from edge_runtime.device.home import Home
from edge_runtime.device.outbox import Outbox, pending_for
from tests.edge.encrypted import VAULT, tensors_in

NAMES = [f"{module}.lora_b" for module in MODULES]
INT4 = wire.Quantisation(4, (1.4, 1.4))  # a code is 0.2; the stand-in changes everything by 0.25 · (round + 1)


@pytest.fixture
def coarse(bench: Bench) -> Bench:
    """A bench whose aggregator plans four rounds of int4."""
    quantise_all(bench.aggregator)
    return bench


def quantise_all(aggregator: Aggregator, *, rounds: int = 4) -> None:
    aggregator.rounds, aggregator.quantisation = rounds, INT4
    aggregator.plans.clear()
    aggregator._open()


def sent(bench: Bench) -> dict[str, np.ndarray]:
    """The sum of everything that counted, by tensor; its layout is the same in every round."""
    counted = [update.values for by_device in bench.aggregator.counted.values() for _, update in by_device.values()]
    layout = wire.layout_of(bench.aggregator.plans[0].plan.modules, bench.aggregator.bundle.manifest.features, {})
    return layout.split(np.sum(counted, axis=0, dtype=np.float64))


def check_books(bench: Bench, *rounds: int) -> None:
    """Sent and owed are what the rounds that counted had learned."""
    learned = sum(0.25 * (round_ + 1) for round_ in rounds)
    owed, parts = tensors_in(bench.home.residual, "residual", bench.home.vault()), sent(bench)
    assert set(owed) == set(parts) == set(NAMES)
    for name in NAMES:
        np.testing.assert_allclose(parts[name] + owed[name], learned, atol=1e-6)
        assert np.abs(owed[name]).max() <= 0.2 + 1e-6


def nothing_left_over(bench: Bench) -> None:
    assert list(bench.home.outbox.iterdir()) == []
    assert not bench.home.work.exists()


async def test_rounds_of_int4_add_up(coarse: Bench) -> None:
    await coarse.run()
    assert coarse.of(events.Finished)
    check_books(coarse, 0, 1, 2, 3)
    nothing_left_over(coarse)
    size = wire.layout_of(coarse.aggregator.plans[0].plan.modules, coarse.aggregator.bundle.manifest.features, {}, INT4)
    assert {len(sealed) for _, _, sealed in coarse.aggregator.received} == {size.frame_bytes + 48} == {148 + 40 + 48}


async def test_a_refused_update_leaves_the_residual_as_it_was(coarse: Bench) -> None:
    await coarse.run(once=True)
    before = coarse.home.residual.read_bytes()
    coarse.aggregator.faults.close_before_upload = True
    await coarse.run(once=True)
    assert [event.reason for event in coarse.of(events.Skipped)] == ["round-closed"]
    assert coarse.home.residual.read_bytes() == before
    check_books(coarse, 0)
    nothing_left_over(coarse)
    await coarse.run()
    check_books(coarse, 0, 2, 3)


async def test_staying_out_of_a_round_leaves_the_residual_as_it_was(coarse: Bench) -> None:
    await coarse.run(once=True)
    before = coarse.home.residual.read_bytes()
    coarse.trainer.weight = 0  # few examples
    await coarse.run(once=True)
    assert [event.reason for event in coarse.of(events.Skipped)] == ["few-examples"]
    assert coarse.home.residual.read_bytes() == before
    nothing_left_over(coarse)


async def test_an_answer_that_is_lost_counts_once(coarse: Bench) -> None:
    """The server has counted the update, the device does not know it and dies."""
    await coarse.run(once=True)
    before = coarse.home.residual.read_bytes()
    coarse.aggregator.faults.deaf = 1
    coarse.stop_at(events.Waiting)
    with pytest.raises(asyncio.CancelledError):
        await coarse.run()
    assert coarse.home.residual.read_bytes() == before
    assert (coarse.home.outbox / "round-1.residual").exists()
    coarse.on_event = None
    await coarse.run()
    assert coarse.trainer.calls == [0, 1, 2, 3]
    check_books(coarse, 0, 1, 2, 3)


class KilledError(Exception):
    """The process is gone at this instant."""


def die(*_: object, **__: object) -> None:
    raise KilledError


@pytest.mark.parametrize(
    ("owner", "step"),
    [
        (Outbox, "add"),  # trained, nothing is durable
        (Outbox, "keep_carried"),  # acknowledged, the residual has not moved
        (Home, "save_state"),  # it has moved, the state does not say that the round is done
        (Outbox, "remove"),  # the state says so, the journal is still there
    ],
)
async def test_a_crash_at_any_step_neither_loses_nor_doubles(
    coarse: Bench, monkeypatch: pytest.MonkeyPatch, owner: type, step: str
) -> None:
    await coarse.run(once=True)
    state = coarse.home.state()

    def later(self: Home, new: object) -> None:
        """Only the state that ends round 1 is not written; those before it are."""
        if getattr(new, "done_round", 0) > state.done_round:
            die()
        real(self, new)

    real = Home.save_state
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, later if step == "save_state" else die)
        with pytest.raises(KilledError):
            await coarse.run()
    await coarse.run()
    check_books(coarse, 0, 1, 2, 3)
    nothing_left_over(coarse)
    assert coarse.home.state().counted == 4


async def test_a_crash_between_the_writes_of_the_journal_trains_again(
    coarse: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual is in the outbox, its update is not: it belongs to nothing and is replaced."""

    def all_but_the_record(path: Path, data: bytes) -> None:
        if path.suffix == ".record":
            die()
        write_bytes(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("edge_runtime.device.outbox.write_bytes", all_but_the_record)
        with pytest.raises(KilledError):
            await coarse.run()
    assert (coarse.home.outbox / "round-0.residual").exists()
    assert not coarse.home.residual.exists()
    await coarse.run(once=True)
    assert coarse.trainer.calls == [0, 0]
    check_books(coarse, 0)


async def test_an_old_residual_of_the_same_round_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox", VAULT)
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox" / "round-3.residual").write_bytes(b"old")
    outbox.add(pending_for("docs", 3, "a" * 64, sealed=b"x", weight=1), b"x", carried=tmp_path / "none")
    outbox.keep_carried(3, tmp_path)
    assert not (tmp_path / "residual.encrypted").exists()


async def test_a_float_round_in_between_touches_no_residual(coarse: Bench) -> None:
    await coarse.run(once=True)
    before = coarse.home.residual.read_bytes()
    coarse.aggregator.quantisation = None
    coarse.aggregator.plans.pop()
    coarse.aggregator._open()
    await coarse.run(once=True)
    assert coarse.trainer.calls == [0, 1]
    assert coarse.home.residual.read_bytes() == before
    last = coarse.aggregator.counted[1]["pi-1"][1]
    np.testing.assert_array_equal(last.values, np.float32(0.5))


async def test_every_training_draws_its_own_seed(coarse: Bench) -> None:
    seeds: list[int] = []
    coarse.trainer.before = lambda job: seeds.append(job.rounding_seed)
    await coarse.run()
    assert len(set(seeds)) == 4
    assert min(seeds) >= 0


async def test_only_the_owner_reads_it_and_leaving_removes_it(coarse: Bench) -> None:
    coarse.aggregator.faults.away_for = {"PUT"}
    coarse.stop_at(events.Waiting)
    with pytest.raises(asyncio.CancelledError):
        await coarse.run()
    assert stat.S_IMODE((coarse.home.outbox / "round-0.residual").stat().st_mode) == 0o600
    coarse.aggregator.faults.away_for, coarse.on_event = set(), None
    await coarse.run(once=True)
    assert stat.S_IMODE(coarse.home.residual.stat().st_mode) == 0o600
    coarse.home.forget()
    assert not coarse.home.residual.exists()
