"""Adapters made from the one that is here: a patch saves bytes, and whatever is wrong with it costs only those."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from device_bench import Bench
from device_bundle import TinyBundle
from device_server import Aggregator, Serving

from edge_runtime import wire
from edge_runtime.bundle import encode_tensors
from edge_runtime.device import events
from edge_runtime.device.home import Home
from edge_runtime.device.records import DeviceState

LAST = 4


@pytest.fixture
async def aggregator(tiny_bundle: TinyBundle) -> AsyncIterator[Aggregator]:
    async with Serving(Aggregator(tiny_bundle, rounds=LAST)) as serving:
        yield serving


def whole_fetches(bench: Bench) -> list[str]:
    """Digests of the adapters that were fetched whole, by the rounds' order."""
    adapters = [signed.plan.adapter for signed in bench.aggregator.plans]
    return [digest for digest in adapters if bench.aggregator.blob_requests(digest)]


def check_end(bench: Bench) -> None:
    """The device has trained every round it could on the right adapter and holds the last one, to the bit."""
    state, last = bench.home.state(), bench.aggregator.plans[-1].plan
    assert bench.of(events.Finished)
    assert (state.adapter, state.adapter_round, state.published) == (last.adapter, last.round, last.adapter)
    assert bench.home.adapter_path(last.adapter).read_bytes() == bench.aggregator.blobs[last.adapter]
    assert [path.name for path in (bench.home.folder / "adapters").iterdir()] == [f"{last.adapter}.safetensors"]


async def test_a_whole_task_needs_no_whole_adapter(bench: Bench) -> None:
    """From the bundle's own to the last one; a patch has the factor that was trained, and every byte is counted."""
    await bench.run()
    check_end(bench)
    assert whole_fetches(bench) == []
    patches = bench.aggregator.patch_requests()
    assert [(since, round_) for since, round_, _ in patches] == [(r - 1, r) for r in range(LAST + 1)]
    factor_b = 2 * 4 * 4 * 10
    header = 56 + 2  # and a bit for each of the four components of two modules' two factors
    assert [size for _, _, size in patches] == [header] + [header + factor_b] * LAST
    assert [event.bytes for event in bench.of(events.Fetched)][1:] == [size for _, _, size in patches][1:]


async def test_a_device_that_missed_rounds_asks_from_where_it_is(bench: Bench) -> None:
    await bench.run(once=True)
    before = bench.home.state().adapter
    for _ in range(2):
        bench.aggregator.close_round()  # without updates: the adapter stays
    bench.aggregator.wanted = 1
    await bench.run(once=True)
    assert bench.aggregator.patch_requests()[-1][:2] == (0, 3)
    assert bench.home.state().adapter != before
    await bench.run()
    check_end(bench)
    assert whole_fetches(bench) == []


def flip(offset: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        flip(0),  # magic
        flip(24),  # the digest it says it makes
        flip(56),  # a mark
        flip(60),  # a value: the frame is right, its digest is not
        lambda data: data[:-1],
        lambda data: data + bytes(1 << 20),
        lambda _: b"",
        lambda data: data[:16] + (0).to_bytes(8, "little") + data[24:],  # from another round
    ],
)
async def test_a_bad_patch_costs_only_its_bytes(bench: Bench, damage: Callable[[bytes], bytes]) -> None:
    await bench.run(once=True)
    await bench.run(once=True)
    bench.aggregator.faults.swap_patch = damage
    await bench.run(once=True)
    third = bench.aggregator.plans[2].plan.adapter
    assert whole_fetches(bench) == [third]
    assert bench.of(events.Waiting) == []
    assert (bench.home.state().adapter, bench.home.state().adapter_round) == (third, 2)
    bench.aggregator.faults.swap_patch = None
    await bench.run()
    check_end(bench)
    assert whole_fetches(bench) == [third]


async def test_too_long_a_patch_is_not_read_to_its_end(bench: Bench) -> None:
    bench.aggregator.faults.swap_patch = lambda data: data + bytes(8 << 20)
    await bench.run(once=True)
    assert bench.home.state().bytes_down < len(b"".join(bench.aggregator.bundle.blobs.values())) + (1 << 20)
    assert whole_fetches(bench) == [bench.aggregator.plans[0].plan.adapter]


async def test_an_older_aggregator_has_no_patches(bench: Bench) -> None:
    bench.aggregator.faults.no_patches = True
    await bench.run()
    check_end(bench)
    assert len(whole_fetches(bench)) == LAST + 1


async def test_a_base_that_rotted_is_not_built_on(bench: Bench) -> None:
    await bench.run(once=True)
    path = bench.home.adapter_path(bench.home.state().adapter)
    path.write_bytes(b"rot" + path.read_bytes()[3:])
    await bench.run()
    check_end(bench)
    assert [since for since, _, _ in bench.aggregator.patch_requests()] == [-1, -1, 1, 2, 3]
    assert whole_fetches(bench) == []


async def test_a_cut_patch_is_asked_again_and_given_up_at_last(bench: Bench) -> None:
    """Once or twice it is tried again; a link that breaks every time gets the file whose download goes on."""
    bench.aggregator.faults.cut_patches = 2
    await bench.run(once=True)
    assert [event.error for event in bench.of(events.Waiting)] == ["TransportError"] * 2
    assert whole_fetches(bench) == []
    bench.aggregator.faults.cut_patches = 99
    await bench.run(once=True)
    assert len(bench.of(events.Waiting)) == 2 + 3
    assert whole_fetches(bench) == [bench.aggregator.plans[1].plan.adapter]
    assert bench.aggregator.faults.cut_patches == 99 - 3
    bench.aggregator.faults.cut_patches = 0
    await bench.run()
    check_end(bench)


async def test_a_crash_between_patch_and_state(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file is there and the state knows the old one: both are kept, nothing is fetched again."""
    await bench.run(once=True)
    old = bench.home.state().adapter
    save = Home.save_state

    def die(self: Home, state: DeviceState) -> None:
        if state.adapter_round == 1:
            raise OSError("power lost")
        save(self, state)

    monkeypatch.setattr(Home, "save_state", die)
    with pytest.raises(OSError, match="power lost"):
        await bench.run()
    monkeypatch.setattr(Home, "save_state", save)
    new = bench.aggregator.plans[1].plan.adapter
    assert {path.stem for path in (bench.home.folder / "adapters").iterdir()} == {old, new}
    assert bench.home.state().adapter == old
    asked = len(bench.aggregator.patch_requests())
    await bench.run()
    check_end(bench)
    assert [since for since, _, _ in bench.aggregator.patch_requests()[asked:]] == [1, 2, 3]
    assert whole_fetches(bench) == []


async def test_after_such_a_crash_a_later_round_is_patched_from_the_old(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round passes before the device is back: what the state knows is still there to build on."""
    await bench.run(once=True)
    with monkeypatch.context() as patched:
        patched.setattr(Home, "prune", lambda *_, **__: (_ for _ in ()).throw(OSError("power lost")))
        patched.setattr(Home, "save_state", lambda *_: None)
        with pytest.raises(OSError, match="power lost"):
            await bench.run()
    moved = {name: array + 1 for name, array in bench.aggregator.tensors_of(1).items()}
    bench.aggregator.adapter = bench.aggregator.store(encode_tensors(moved))  # what other devices made of round 1
    bench.aggregator.close_round()
    await bench.run()
    check_end(bench)
    assert (0, 2) in [request[:2] for request in bench.aggregator.patch_requests()]
    assert whole_fetches(bench) == []


async def test_half_a_patch_of_a_dead_process_does_no_harm(bench: Bench) -> None:
    await bench.run(once=True)
    plan = bench.aggregator.plans[1].plan
    bench.home.adapter_path(plan.adapter).with_name(f"{plan.adapter}.safetensors.patch").write_bytes(b"half")
    await bench.run()
    check_end(bench)
    assert whole_fetches(bench) == []


async def test_a_plan_that_lies_about_its_adapter_is_refused_as_before(bench: Bench) -> None:
    """A patch that makes another file than the plan names is never used, whatever its frame says."""
    lie = msgspec.structs.replace(bench.aggregator.plans[0].plan, adapter=hashlib.sha256(b"other").hexdigest())
    bench.aggregator.blobs[lie.adapter] = bench.aggregator.bundle.adapter
    bench.aggregator.faults.plan = wire.sign_plan(lie, bench.aggregator.key).data
    bench.stop_at(events.Waiting)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    (waiting,) = bench.of(events.Waiting)
    assert waiting.error == "ArtifactDigestError"
    assert bench.trainer.calls == []
    assert not list(Path(bench.home.folder / "adapters").glob("*"))
