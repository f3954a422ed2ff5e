"""Whatever does not verify is refused by its own error, and nothing is trained on it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from device_bench import Bench
from device_bundle import MODULES, WIDTH

from edge_runtime import wire
from edge_runtime.bundle import encode_tensors, parse_tensors
from edge_runtime.device import events
from edge_runtime.device.errors import TrainingError
from edge_runtime.device.floors import Floors
from edge_runtime.device.floors_command import floors
from edge_runtime.device.records import Settings


async def refused(bench: Bench, error: str) -> events.Waiting:
    """Run until the device waits; it must be for this error, with nothing trained, sent or counted as done."""
    trained, sent = list(bench.trainer.calls), len(bench.aggregator.received)
    state = bench.home.state()
    bench.seen.clear()
    bench.stop_at(events.Waiting, 2)  # the second time: it asked again
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    first, second = bench.of(events.Waiting)
    assert (first.error, second.error) == (error, error)
    assert bench.trainer.calls == trained
    assert len(bench.aggregator.received) == sent
    assert bench.home.state().done_round == state.done_round
    return first


async def recovers(bench: Bench) -> None:
    """After the fault is gone the same home finishes the task."""
    bench.on_event = None
    await bench.run()
    assert bench.of(events.Finished)


async def test_a_tampered_plan(bench: Bench) -> None:
    data = bytearray(bench.aggregator.plans[0].data)
    data[-20] ^= 1
    bench.aggregator.faults.plan = bytes(data)
    event = await refused(bench, "PlanSignatureError")
    assert "not signed by the aggregator this device enrolled with" in event.detail
    bench.aggregator.faults.plan = None
    await recovers(bench)


async def test_a_plan_of_another_key(bench: Bench) -> None:
    plan = bench.aggregator.plans[0].plan
    bench.aggregator.faults.plan = wire.sign_plan(plan, Ed25519PrivateKey.generate()).data
    await refused(bench, "PlanSignatureError")


async def test_an_oversized_plan(bench: Bench) -> None:
    bench.aggregator.faults.plan = bytes(3 << 20)
    event = await refused(bench, "PlanFormatError")
    assert "got 1048577" in event.detail  # no more than the limit and one byte was read


async def test_a_plan_of_another_task(bench: Bench) -> None:
    plan = msgspec.structs.replace(bench.aggregator.plans[0].plan, task="other")
    bench.aggregator.faults.plan = wire.sign_plan(plan, bench.aggregator.key).data
    await refused(bench, "PlanOrderError")


async def test_an_older_round_replayed(bench: Bench) -> None:
    """A genuine, signed, but older plan is refused after a newer one was seen, also after a restart."""
    await bench.run(once=True)
    bench.stop_at(events.Planned, 2)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    assert bench.home.state().seen_round == 1
    bench.aggregator.faults.plan = bench.aggregator.plans[0].data
    event = await refused(bench, "PlanOrderError")
    assert "expected round 1 or later, got 0" in event.detail
    bench.aggregator.faults.plan = None
    await recovers(bench)


async def test_an_answer_that_was_kept_is_not_obeyed(bench: Bench) -> None:
    """A genuine plan of a round the device has not seen, with the answer that was made for another request."""
    await bench.run(once=True)
    bench.stop_at(events.Planned, 2)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    bench.aggregator.faults.plan = bench.aggregator.plans[-1].data
    bench.aggregator.faults.proof = bench.aggregator.proofs[-1]
    event = await refused(bench, "PlanStaleError")
    assert "an old one is given again" in event.detail
    assert bench.home.state().seen_round == 1
    bench.aggregator.faults.plan = bench.aggregator.faults.proof = None
    await recovers(bench)


async def test_an_older_aggregator_is_told_of(bench: Bench) -> None:
    """Its answers do not say that a plan is in force: the line says what to upgrade."""
    bench.aggregator.faults.proof = ""
    event = await refused(bench, "PlanStaleError")
    assert "has to be upgraded" in event.detail
    assert bench.home.state().seen_round == -1


async def test_the_round_just_done_is_not_obeyed_again(bench: Bench) -> None:
    await bench.run(once=True)
    bench.aggregator.faults.plan = bench.aggregator.plans[0].data
    event = await refused(bench, "PlanOrderError")
    assert "expected a round after 0, got 0" in event.detail


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"adapter_bytes": 2 << 30}, "adapter_bytes"),
        (
            {"training": wire.Training(batch_size=1, max_tokens=1, lr_a=0, lr_b=0, lr_head=0, steps=10**9)},
            "training.steps",
        ),
    ],
)
async def test_a_plan_over_the_devices_floors(bench: Bench, changes: dict[str, object], what: str) -> None:
    plan = msgspec.structs.replace(bench.aggregator.plans[0].plan, **changes)
    bench.aggregator.faults.plan = wire.sign_plan(plan, bench.aggregator.key).data
    event = await refused(bench, "FloorError")
    assert what in event.detail


async def test_a_device_may_want_a_bound_on_its_changes(bench: Bench) -> None:
    """A plan without one is not obeyed; with one it is."""
    bench.settings = msgspec.structs.replace(bench.settings, floors=Floors(norm_bound=True))
    event = await refused(bench, "FloorError")
    assert "update.max_norm: expected a bound on the norm of a change, got none" in event.detail
    plan = bench.aggregator.plans[0].plan
    bounded = msgspec.structs.replace(plan, update=msgspec.structs.replace(plan.update, max_norm=10.0))
    bench.aggregator.plans[0] = wire.sign_plan(bounded, bench.aggregator.key)
    bench.on_event = None
    await bench.run(once=True)
    assert bench.of(events.Uploaded)


async def test_the_users_floors_hold(bench: Bench) -> None:
    bench.settings = msgspec.structs.replace(bench.settings, floors=Floors(max_steps=2, max_modules=1))
    event = await refused(bench, "FloorError")
    assert "modules: expected at most 1, got 2; training.steps: expected at most 2, got 3" in event.detail


async def test_a_users_floor_holds_for_a_bundle(bench: Bench) -> None:
    bench.settings = msgspec.structs.replace(bench.settings, floors=Floors(max_bundle_bytes=1000))
    event = await refused(bench, "FloorError")
    assert "size: expected at most 1000 bytes" in event.detail


def test_floors_are_kept_shown_and_reset(bench: Bench) -> None:
    """Without touching what else the settings say."""
    home, said = str(bench.home.folder), CliRunner()
    bench.home.save_settings(Settings(data=("a",)))
    done = said.invoke(floors, ["--home", home, "--max-bundle-mb", "2000", "--norm-bound", "--max-steps", "500"])
    assert done.exit_code == 0
    assert "at most 2,000 MiB" in done.output
    kept = bench.home.settings()
    assert kept == Settings(data=("a",), floors=Floors(max_bundle_bytes=2000 << 20, norm_bound=True, max_steps=500))
    shown = said.invoke(floors, ["--home", home, "--json"])
    assert msgspec.json.decode(shown.output, type=Floors) == kept.floors
    assert said.invoke(floors, ["--home", home, "--defaults", "--max-modules", "9"]).exit_code == 0
    assert bench.home.settings() == Settings(data=("a",), floors=Floors(max_modules=9))
    assert said.invoke(floors, ["--home", home, "--max-steps", "0"]).exit_code == 2


async def test_a_tampered_manifest(bench: Bench) -> None:
    digest = bench.aggregator.bundle.digest
    bench.aggregator.faults.swap_blob[digest] = bench.aggregator.blobs[digest].replace(b"tiny", b"tinY")
    await refused(bench, "ArtifactDigestError")
    assert not bench.home.bundle_path(digest).exists()
    bench.aggregator.faults.swap_blob.clear()
    await recovers(bench)


async def test_a_tampered_file_of_the_bundle_is_fetched_once_more_and_refused(bench: Bench) -> None:
    weights = bench.aggregator.bundle.weights
    bench.aggregator.faults.swap_blob[weights] = b"\0" * len(bench.aggregator.blobs[weights])
    await refused(bench, "ArtifactDigestError")
    assert len(bench.aggregator.blob_requests(weights)) == 4  # twice each time
    bench.aggregator.faults.swap_blob.clear()
    await recovers(bench)


async def test_a_file_longer_than_the_manifest_says_is_not_read_to_its_end(bench: Bench) -> None:
    weights = bench.aggregator.bundle.weights
    honest = bench.aggregator.blobs[weights]
    bench.aggregator.faults.swap_blob[weights] = honest + bytes(8 << 20)
    await refused(bench, "ArtifactDigestError")
    assert bench.home.state().bytes_down < 4 * (len(honest) + (2 << 20))


async def test_a_tampered_adapter(bench: Bench) -> None:
    bench.aggregator.faults.no_patches = True
    digest = bench.aggregator.plans[0].plan.adapter
    data = bytearray(bench.aggregator.blobs[digest])
    data[-1] ^= 1
    bench.aggregator.faults.swap_blob[digest] = bytes(data)
    await refused(bench, "ArtifactDigestError")
    bench.aggregator.faults.swap_blob.clear()
    await recovers(bench)


def _with_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{MODULES[0]}.lora_b"][0, 0] = np.nan


def _with_other_rank(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{MODULES[0]}.lora_a"] = np.zeros((3, WIDTH), np.float32)


def _without_a_module(tensors: dict[str, np.ndarray]) -> None:
    del tensors[f"{MODULES[0]}.lora_a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [(_with_nan, "NaN or infinity"), (_with_other_rank, "expected float32 (4, 6)"), (_without_a_module, "missing")],
)
async def test_a_signed_plan_with_an_adapter_that_does_not_fit(
    bench: Bench, change: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    aggregator = bench.aggregator
    tensors = {name: array.copy() for name, array in parse_tensors(aggregator.bundle.adapter, what="").items()}
    change(tensors)
    data = encode_tensors(tensors)
    plan = msgspec.structs.replace(aggregator.plans[0].plan, adapter=aggregator.store(data), adapter_bytes=len(data))
    aggregator.faults.plan = wire.sign_plan(plan, aggregator.key).data
    event = await refused(bench, "ArtifactFormatError")
    assert message in event.detail


async def test_a_signed_plan_whose_bundle_is_none(bench: Bench) -> None:
    plan = msgspec.structs.replace(bench.aggregator.plans[0].plan, bundle=bench.aggregator.store(b"{}"))
    bench.aggregator.faults.plan = wire.sign_plan(plan, bench.aggregator.key).data
    event = await refused(bench, "ArtifactFormatError")
    assert "unknown schema" in event.detail


async def test_a_signed_plan_for_modules_the_bundle_lacks(bench: Bench) -> None:
    modules = (wire.ModulePlan("layers.7.up", 4, "B"),)
    plan = msgspec.structs.replace(bench.aggregator.plans[0].plan, modules=modules)
    bench.aggregator.faults.plan = wire.sign_plan(plan, bench.aggregator.key).data
    event = await refused(bench, "ArtifactFormatError")
    assert "the plan's modules are not those of bundle" in event.detail


async def test_a_blob_the_server_lost(bench: Bench) -> None:
    bench.aggregator.faults.no_patches = True
    plan = msgspec.structs.replace(bench.aggregator.plans[0].plan, adapter="a" * 64)
    bench.aggregator.faults.plan = wire.sign_plan(plan, bench.aggregator.key).data
    event = await refused(bench, "ArtifactError")
    assert "the server does not have it" in event.detail


async def test_a_bundle_that_rotted_on_disk_is_fetched_again(bench: Bench) -> None:
    await bench.run(once=True)
    aggregator = bench.aggregator
    weights = bench.home.bundle_path(aggregator.bundle.digest) / "weights.safetensors"
    weights.write_bytes(b"rot" + weights.read_bytes()[3:])
    bench.seen.clear()
    await bench.run()
    assert len(aggregator.blob_requests(aggregator.bundle.weights)) == 2
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == aggregator.bundle.weights


async def test_an_adapter_that_rotted_on_disk_is_fetched_again(bench: Bench) -> None:
    bench.aggregator.faults.no_patches = True

    def die(_: object) -> None:
        bench.trainer.before = None
        raise TrainingError("power lost")

    bench.trainer.before = die
    with pytest.raises(TrainingError):
        await bench.run()
    digest = bench.aggregator.plans[0].plan.adapter
    bench.home.adapter_path(digest).write_bytes(b"rot")
    await recovers(bench)
    assert bench.trainer.calls == [0, 0, 1]
    assert len(bench.aggregator.blob_requests(digest)) == 2


async def test_a_receipt_for_another_update_is_not_believed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench.aggregator, "_count", lambda device, round_, _, digest: wire.UpdateReceipt(device, round_, "e" * 64, 1)
    )
    bench.stop_at(events.Waiting)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    (event,) = bench.of(events.Waiting)
    assert (event.error, bench.home.state().counted) == ("RefusedError", 0)
    assert "receipt: expected round 0" in event.detail
