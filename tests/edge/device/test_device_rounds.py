"""A device through whole tasks. Invariants: a round is trained once and counted at most once; nothing that fails to
verify is trained on; whatever was interrupted goes on."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path

import msgspec
import numpy as np
import pytest
from device_bench import Bench
from device_bundle import MODULES, TinyBundle
from device_server import Aggregator, Serving

from edge_runtime import wire
from edge_runtime.bundle import open_bundle, parse_tensors, read_peft_folder
from edge_runtime.device import client, events
from edge_runtime.device.enrolment import enrol
from edge_runtime.device.errors import NotPublishedError, TrainingError, TrainingInputError
from edge_runtime.device.gate import LOOK_S
from edge_runtime.device.home import Home, published_adapter
from edge_runtime.device.host import Host
from edge_runtime.device.outbox import Outbox, pending_for
from edge_runtime.device.records import Measured
from tests.edge.encrypted import KEY, VAULT


async def test_a_task_runs_from_first_plan_to_published_adapter(bench: Bench, tiny_bundle: TinyBundle) -> None:
    await bench.run()
    assert bench.trainer.calls == [0, 1]
    assert [event.round for event in bench.of(events.Uploaded)] == [0, 1]
    (finished,) = bench.of(events.Finished)
    start = parse_tensors(tiny_bundle.adapter, what="start")
    end = parse_tensors(bench.home.adapter_path(finished.adapter).read_bytes(), what="end")
    for name in MODULES:
        np.testing.assert_allclose(end[f"{name}.lora_b"], start[f"{name}.lora_b"] + 0.75, rtol=1e-6)
        np.testing.assert_array_equal(end[f"{name}.lora_a"], start[f"{name}.lora_a"])


@pytest.mark.parametrize(("told_s", "tier"), [(9.0, 1), (1.0, 0)])
async def test_a_slow_device_does_not_think_itself_fast(bench: Bench, told_s: float, tier: int) -> None:
    """Its steps of a weaker tier are faster, and say nothing about those of the whole plan."""
    bench.aggregator.rounds = 1
    bench.aggregator.tiers = (wire.Tier(1, step_s=4.0),)
    bench.aggregator.plans[0] = wire.sign_plan(
        msgspec.structs.replace(bench.aggregator.plans[0].plan, tiers=bench.aggregator.tiers), bench.aggregator.key
    )
    bench.home.save_measured(Measured(wire.Capability("aarch64", 4, 3906, 3000, step_s=told_s)))
    bench.trainer.steps = 4
    await bench.run()
    assert [event.tier for event in bench.of(events.TrainedRound)] == [tier]
    measured = bench.home.measured()
    assert measured is not None
    assert (measured.capability.step_s == told_s) == (tier == 1)


@pytest.mark.parametrize(
    ("memory_mib", "wanted", "tier"), [(None, 0, 0), (4096, 0, 0), (400, 0, 1), (400, 2, 2), (4096, 1, 1), (4096, 9, 2)]
)
async def test_a_device_carries_the_tier_that_is_meant_for_it(
    bench: Bench, tiny_bundle: TinyBundle, memory_mib: int | None, wanted: int, tier: int
) -> None:
    """By its memory and its user's wish, from the plan alone; what it does not carry stays, and the user is told."""
    bench.aggregator.rounds = 1
    bench.aggregator.tiers = (wire.Tier(0, max_rank=2, memory_mib=512), wire.Tier(1, max_rank=2))
    bench.aggregator.plans[0] = wire.sign_plan(
        msgspec.structs.replace(bench.aggregator.plans[0].plan, tiers=bench.aggregator.tiers), bench.aggregator.key
    )
    bench.memory_mb, bench.tier = memory_mib, wanted
    await bench.run()
    assert [event.tier for event in bench.of(events.TrainedRound)] == [tier]
    (finished,) = bench.of(events.Finished)
    start = parse_tensors(tiny_bundle.adapter, what="start")
    end = parse_tensors(bench.home.adapter_path(finished.adapter).read_bytes(), what="end")
    moved = [(end[f"{name}.lora_b"] != start[f"{name}.lora_b"]).all(axis=0).sum() for name in MODULES]
    assert moved == {0: [4, 4], 1: [2, 2], 2: [0, 2]}[tier]


async def test_the_published_folder_is_what_peft_loads(bench: Bench) -> None:
    await bench.run()
    folder = bench.home.published_folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "published.json",
    ]
    assert json.loads((folder / "adapter_config.json").read_bytes())["target_modules"] == ["up"]
    published = bench.home.published()
    assert published is not None
    assert bench.home.bundle_path(published.bundle).is_dir()


async def test_other_commands_find_the_published_adapter(bench: Bench) -> None:
    with pytest.raises(NotPublishedError, match="it arrives when the task is finished"):
        published_adapter(bench.home.folder)
    await bench.run()
    bundle, adapter = published_adapter(bench.home.folder)
    read = read_peft_folder(adapter, open_bundle(bundle).manifest)
    np.testing.assert_array_equal(
        read["layers.0.up.lora_b"],
        parse_tensors(bench.aggregator.blobs[bench.aggregator.adapter], what="")["layers.0.up.lora_b"],
    )


async def test_a_finished_device_asks_nobody(bench: Bench) -> None:
    await bench.run()
    before = len(bench.aggregator.requests)
    await bench.run()
    assert len(bench.aggregator.requests) == before
    assert len(bench.of(events.Finished)) == 2


async def test_only_what_is_in_force_is_kept_and_the_frame_is_gone(bench: Bench) -> None:
    await bench.run()
    home = bench.home
    assert [path.name for path in (home.folder / "adapters").iterdir()] == [f"{home.state().published}.safetensors"]
    assert [path.name for path in (home.folder / "plans").iterdir()] == ["round-2.plan"]
    assert not home.work.exists()
    assert list(home.outbox.iterdir()) == []


async def test_bytes_are_counted(bench: Bench) -> None:
    await bench.run()
    state = bench.home.state()
    assert state.bytes_up == sum(len(sealed) for _, _, sealed in bench.aggregator.received)
    assert state.bytes_down > len(bench.aggregator.blobs[bench.aggregator.bundle.weights])
    assert state.counted == 2


async def test_a_server_that_knows_no_parts_is_sent_whole_updates(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one from before parts; the tests' server is one."""
    monkeypatch.setattr(client, "PART_BYTES", 100)
    await bench.run()
    assert bench.home.state().counted == 2
    asked = [path for method, path, *_ in bench.aggregator.requests if method == "GET" and "/parts/" in path]
    assert len(asked) == 2


async def test_once_ends_after_a_round(bench: Bench) -> None:
    await bench.run(once=True)
    assert bench.trainer.calls == [0]
    await bench.run(once=True)
    assert bench.trainer.calls == [0, 1]


async def test_a_restart_between_training_and_upload_sends_the_same_bytes(bench: Bench) -> None:
    """The server counts the update but its answer is lost, and then the device dies: one training, one contribution."""
    bench.aggregator.faults.deaf = 1
    bench.stop_at(events.Waiting)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    assert Outbox(bench.home.outbox, bench.home.vault()).first() is not None
    bench.on_event = None
    await bench.run()
    first, second, *_ = bench.aggregator.received
    assert first == second
    assert bench.trainer.calls == [0, 1]
    assert bench.home.state().counted == 2


async def test_a_crash_between_acknowledgement_and_tidying_up_sends_nothing_twice(bench: Bench) -> None:
    await bench.run(once=True)
    sealed = bench.aggregator.received[0][2]
    Outbox(bench.home.outbox, bench.home.vault()).add(pending_for("docs", 0, "0" * 64, sealed=sealed, weight=5), sealed)
    await bench.run()
    assert [round_ for round_, _, _ in bench.aggregator.received] == [0, 1]
    assert Outbox(bench.home.outbox, bench.home.vault()).first() is None


def test_what_a_crash_left_beside_the_journal_is_swept(tmp_path: Path) -> None:
    """An update with its record stays whole; what has none, or is half written, goes."""
    outbox = Outbox(tmp_path, VAULT)
    outbox.sweep()
    outbox.add(pending_for("docs", 1, "0" * 64, sealed=b"sealed", weight=5), b"sealed")
    whole = {"round-1.record", "round-1.sealed", "round-1.personal"}
    left = (
        "round-1.record.partial",
        "round-1.sealed.partial",
        "round-2.sealed",
        "round-2.sealed.partial",
        "round-0.residual",
    )
    for name in (*left, "round-1.personal"):
        (tmp_path / name).write_bytes(b"x")
    outbox.sweep()
    assert {path.name for path in tmp_path.iterdir()} == whole


async def test_a_round_closed_before_the_upload_arrives_is_left_out(bench: Bench) -> None:
    bench.aggregator.faults.close_before_upload = True
    await bench.run()
    (skipped,) = bench.of(events.Skipped)
    assert (skipped.round, skipped.reason) == (0, "round-closed")
    assert [event.round for event in bench.of(events.Uploaded)] == [1]
    assert list(bench.home.outbox.iterdir()) == []


async def test_a_conflict_is_obeyed(bench: Bench) -> None:
    bench.aggregator.wanted = 2  # the round stays open
    other = wire.UpdateReceipt("pi-1", 0, "f" * 64, 1)
    bench.aggregator.counted[0] = {"pi-1": (other, None)}  # type: ignore[dict-item]
    bench.stop_at(events.Skipped)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    (skipped,) = bench.of(events.Skipped)
    assert skipped.reason == "update-conflict"
    assert bench.home.state().done_round == 0


async def test_a_device_with_too_few_examples_stays_out(bench: Bench) -> None:
    bench.aggregator.min_examples = 6
    bench.aggregator.plans.clear()
    bench.aggregator._open()
    bench.stop_at(events.Skipped)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    (skipped,) = bench.of(events.Skipped)
    assert (skipped.reason, skipped.detail) == ("few-examples", "this device has 5 examples: expected at least 6")
    assert bench.aggregator.received == []


async def test_a_damaged_journal_is_not_sent_and_not_trained_again(bench: Bench) -> None:
    bench.aggregator.faults.away_for = {"PUT"}
    bench.stop_at(events.Waiting)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    (bench.home.outbox / "round-0.sealed").write_bytes(b"rot")
    bench.aggregator.faults.away_for = set()
    bench.stop_at(events.Skipped)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    (skipped,) = bench.of(events.Skipped)
    assert skipped.reason == "damaged"
    assert bench.aggregator.received == []
    assert bench.trainer.calls == [0]


async def test_a_server_away_for_a_while_is_waited_for(bench: Bench) -> None:
    bench.aggregator.faults.away = True

    def come_back(event: events.DeviceEvent) -> None:
        if len(bench.of(events.Waiting)) == 8:
            bench.aggregator.faults.away = False

    bench.on_event = come_back
    await bench.run()
    assert bench.of(events.Finished)
    waits = [event.retry_s for event in bench.of(events.Waiting)]
    for attempt, wait in enumerate(waits):
        longest = min(60.0, 2.0**attempt)
        assert longest / 2 <= wait <= longest
    assert bench.of(events.Waiting)[-1].waited_s > 0


async def test_an_aggregator_that_restarts_finds_the_device_again(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    aggregator = Aggregator(tiny_bundle)
    home = Home(tmp_path / "home", KEY)
    async with Serving(aggregator):
        await enrol(home, server=aggregator.url, token=aggregator.token("pi-1"), device="pi-1", host=Host())
        bench = Bench(home, aggregator)
        await bench.run(once=True)
    port = int(aggregator.url.rsplit(":", 1)[1])
    running = asyncio.ensure_future(bench.run())
    while not bench.of(events.Waiting):
        await asyncio.sleep(0.01)
    assert "cannot be reached" in bench.of(events.Waiting)[0].detail
    async with Serving(aggregator, port):
        await running
    assert home.state().finished


@pytest.mark.parametrize("problem", [wire.UnavailableError, wire.RateLimitedError, wire.StorageFullError])
async def test_a_retry_hint_is_obeyed(bench: Bench, problem: type[wire.NotNowError]) -> None:
    """Also that of a server whose disk is full: its update is kept and sent again."""
    bench.aggregator.faults.unavailable_s, bench.aggregator.faults.unavailable = 40.0, problem

    def come_back(event: events.DeviceEvent) -> None:
        if len(bench.of(events.Waiting)) == 3:
            bench.aggregator.faults.unavailable_s = None

    bench.on_event = come_back
    await bench.run()
    assert all(40 <= event.retry_s <= 50 for event in bench.of(events.Waiting)[:3])


async def test_a_server_that_does_not_hold_polls_is_not_asked_in_a_tight_loop(bench: Bench) -> None:
    bench.aggregator.wanted = 2
    await bench.run(once=True)  # the round stays open, so that there is nothing new
    bench.aggregator.faults.empty = True
    bench.slept.clear()
    running = asyncio.ensure_future(bench.run())
    while len(bench.slept) < 3:
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert bench.slept[:3] == [1.0, 1.0, 1.0]


async def test_a_device_that_is_ahead_waits_and_says_so(bench: Bench) -> None:
    """Its aggregator was restored from an older backup: it goes on when a later round is there."""
    await bench.run(once=True)
    bench.aggregator.faults.behind = True
    bench.stop_at(events.Waiting, 2)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    assert {event.error for event in bench.of(events.Waiting)} == {"RoundAheadError"}
    bench.aggregator.faults.behind, bench.on_event = False, None
    await bench.run()
    assert bench.of(events.Finished)


async def test_a_forgotten_device_stops(bench: Bench) -> None:
    bench.aggregator.devices.clear()
    with pytest.raises(wire.UnknownDeviceError, match="pi-1"):
        await bench.run()


@pytest.mark.parametrize("when", [events.Started, events.TrainedRound])
async def test_a_revoked_device_stops_at_its_next_request(bench: Bench, when: type) -> None:
    def revoke(event: events.DeviceEvent) -> None:
        if isinstance(event, when):
            bench.aggregator.revoked.add("pi-1")

    bench.on_event = revoke
    with pytest.raises(wire.DeviceRevokedError, match="pi-1: was revoked"):
        await bench.run()
    assert [seconds for seconds in bench.slept if seconds != LOOK_S] == []
    assert (bench.of(events.Waiting), bench.of(events.Skipped)) == ([], [])


@pytest.mark.parametrize("error", [TrainingInputError("mine.jsonl: line 3: no text"), TrainingError("no graph")])
async def test_failed_training_ends_the_run_and_sends_nothing(bench: Bench, error: Exception) -> None:
    def fail(_: object) -> None:
        raise error

    bench.trainer.before = fail
    with pytest.raises(type(error)):
        await bench.run()
    assert bench.aggregator.received == []
    assert not bench.home.work.exists()
    assert bench.home.state().done_round == -1


async def test_a_plan_that_appears_while_training_costs_only_that_round(bench: Bench) -> None:
    def close(_: object) -> None:
        bench.trainer.before = None
        bench.aggregator.close_round()

    bench.trainer.before = close
    await bench.run()
    assert [event.reason for event in bench.of(events.Skipped)] == ["round-closed"]
    assert bench.of(events.Finished)


async def test_two_devices_share_rounds(tiny_bundle: TinyBundle, tmp_path_factory: pytest.TempPathFactory) -> None:
    async with Serving(Aggregator(tiny_bundle, rounds=3, wanted=2)) as aggregator:
        benches = []
        for name in ("pi-1", "pi-2"):
            home = Home(tmp_path_factory.mktemp(name), KEY)
            await enrol(home, server=aggregator.url, token=aggregator.token(name), device=name, host=Host())
            benches.append(Bench(home, aggregator))
        await asyncio.gather(*(bench.run() for bench in benches))
        assert [bench.trainer.calls for bench in benches] == [[0, 1, 2], [0, 1, 2]]
        assert benches[0].home.state().published == benches[1].home.state().published


async def test_nothing_in_the_home_is_for_others(bench: Bench) -> None:
    await bench.run()
    assert stat.S_IMODE(bench.home.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((bench.home.folder / "identity.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((bench.home.folder / "state.json").stat().st_mode) == 0o600
