"""Whole tasks over real HTTP: what is published is the average, whatever restarts on the way."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import pytest
from cloud_fleet import Device, Site, values_for

from cloud import events
from edge_runtime import wire
from edge_runtime.bundle import parse_tensors


async def contribute(
    device: Device, signed: wire.SignedPlan, seed: int, weight: int
) -> tuple[np.ndarray, wire.UpdateReceipt]:
    values = values_for(device.site, signed, seed)
    sealed = device.seal(signed, device.frame(signed, values, weight=weight, eval_examples=10, eval_correct=seed % 10))
    answer = await device.put(signed, sealed)
    assert answer.status == 201, answer
    return values, wire.decode_message(answer.body, wire.UpdateReceipt)


async def current_adapter(device: Device, signed: wire.SignedPlan) -> dict[str, np.ndarray]:
    data = (await device.blob(signed.plan.adapter)).body
    assert len(data) == signed.plan.adapter_bytes
    return parse_tensors(data, what="adapter")


def moved(adapter: dict[str, np.ndarray], signed: wire.SignedPlan, changes: list[np.ndarray], weights: list[int]):
    """The oracle: one np.average, laid out by hand."""
    mean = np.average(np.stack(changes).astype(np.float64), axis=0, weights=weights)
    result, start = dict(adapter), 0
    names = [f"{m.name}.lora_{factor.lower()}" for m in signed.plan.modules for factor in m.alive]
    for name in [*names, "classifier.weight", "classifier.bias"]:
        size = adapter[name].size
        result[name] = adapter[name] + mean[start : start + size].reshape(adapter[name].shape).astype(np.float32)
        start += size
    assert start == len(mean)
    return result


async def test_three_rounds_end_with_the_average(site: Site, session: aiohttp.ClientSession) -> None:
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    expected = await current_adapter(one, signed)
    for round_ in range(3):
        assert (signed.plan.round, signed.plan.state) == (round_, "train")
        assert {module.alive for module in signed.plan.modules} == {"A" if round_ % 2 else "B"}
        a, _ = await contribute(one, signed, seed=round_, weight=10)
        b, _ = await contribute(two, signed, seed=round_ + 5, weight=30)
        expected = moved(expected, signed, [a, b], [10, 30])
        signed = await one.plan(after=round_)
    assert (signed.plan.round, signed.plan.state) == (3, "finished")
    published = await current_adapter(two, await two.plan(after=2))
    for name, array in expected.items():
        np.testing.assert_allclose(published[name], array, atol=1e-7)
    assert await one.plan(after=3, wait_s=0) is None
    status = await site.operator.status()
    assert (status.state, status.round, [r.devices for r in status.history]) == ("finished", 3, [2, 2, 2])
    assert [r.metric for r in status.history] == [5 / 20, 7 / 20, 9 / 20]
    assert status.bytes_up == sum(d.bytes_up for d in status.devices) > 0
    assert all(d.updates == 3 and d.bytes_down > 0 for d in status.devices)
    folder = site.config.data_path / "published"
    peft = parse_tensors((folder / "adapter_model.safetensors").read_bytes(), what="peft")
    np.testing.assert_array_equal(peft["base_model.model.layer.0.q.lora_A.weight"], published["layer.0.q.lora_a"])
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    assert not [name for name in site.files() if name.startswith("updates/")]
    assert any(isinstance(event, events.TaskFinished) for event in site.events)


async def test_restarts_change_nothing(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """A server stopped in the middle of a round, and between rounds, ends with the same adapter."""
    site = Site.make(tmp_path, rounds=2)
    await site.start()
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    expected = await current_adapter(one, signed)
    for round_ in range(2):
        a, _ = await contribute(one, signed, seed=round_, weight=7)
        await site.restart()
        again = await one.plan()
        assert again.digest == signed.digest
        assert (await site.operator.status()).received == 1
        b, _ = await contribute(two, signed, seed=round_ + 5, weight=3)
        expected = moved(expected, signed, [a, b], [7, 3])
        signed = await one.plan(after=round_)
        await site.restart()
    assert signed.plan.state == "finished"
    published = await current_adapter(one, await one.plan(after=1))
    for name, array in expected.items():
        np.testing.assert_allclose(published[name], array, atol=1e-7)
    await site.close()


async def test_round_closes_at_the_deadline_or_waits(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    site = Site.make(tmp_path, devices_per_round=5, min_devices=2, rounds=1, round_deadline_s=100)
    await site.start()
    devices = [await site.device(session, name) for name in ("one", "two")]
    signed = await devices[0].plan()
    await contribute(devices[0], signed, seed=0, weight=1)
    site.clock.now += 101
    await site.tick()
    assert (await site.operator.status()).deadline == signed.plan.deadline + 100
    assert [event for event in site.events if isinstance(event, events.DeadlineMoved)]
    await site.restart()
    assert (await site.operator.status()).deadline == signed.plan.deadline + 100
    await contribute(devices[1], signed, seed=1, weight=1)
    site.clock.now += 100
    await site.tick()
    assert (await site.operator.status()).state == "finished"
    await site.close()


async def test_stop_publishes_and_discards_the_open_round(site: Site, session: aiohttp.ClientSession) -> None:
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    await contribute(one, signed, seed=0, weight=1)
    await contribute(two, signed, seed=1, weight=1)
    signed = await one.plan(after=0)
    await contribute(one, signed, seed=2, weight=1)
    status = await site.operator.stop()
    assert (status.state, len(status.history)) == ("finished", 1)
    last = await one.plan(after=1)
    assert (last.plan.state, last.plan.round, last.plan.adapter) == ("finished", 2, signed.plan.adapter)
    late = await two.put(signed, two.seal(signed, two.frame(signed, values_for(site, signed, 3))))
    assert (late.status, late.problem()) == (410, "TaskFinishedError")
    assert await site.operator.stop() == await site.operator.status()
    await site.restart()
    assert (await one.plan(after=1)).digest == last.digest


async def test_long_poll_wakes_and_times_out(site: Site, session: aiohttp.ClientSession) -> None:
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    assert await one.plan(after=0, wait_s=0) is None
    poll = asyncio.create_task(one.plan(after=0, wait_s=30))
    await contribute(one, signed, seed=0, weight=1)
    await contribute(two, signed, seed=1, weight=1)
    woken = await asyncio.wait_for(poll, 1.5)
    assert woken is not None
    assert woken.plan.round == 1


async def test_round_key_is_destroyed(site: Site, session: aiohttp.ClientSession) -> None:
    """Once a round is final neither the database nor its log holds the key that opens its updates."""
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    key = site.server.aggregator._work.key.private_bytes_raw()
    files = lambda: b"".join(p.read_bytes() for p in site.config.data_path.glob("emberlora.sqlite3*"))  # noqa: E731
    assert key in files()
    await contribute(one, signed, seed=0, weight=1)
    await contribute(two, signed, seed=1, weight=1)
    assert (await one.plan(after=0)).plan.round == 1
    assert key not in files()


async def test_a_reader_delays_the_end_of_a_rounds_key_and_nothing_else(
    site: Site, session: aiohttp.ClientSession
) -> None:
    """A backup under way keeps the log with the key in it; the next round opens, and the key goes once it is done."""
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    key = site.server.aggregator._work.key.private_bytes_raw()
    kept = lambda: any(key in p.read_bytes() for p in site.config.data_path.glob("emberlora.sqlite3*"))  # noqa: E731
    reader = sqlite3.connect(site.config.data_path / "emberlora.sqlite3")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM rounds").fetchall()
    await contribute(one, signed, seed=0, weight=1)
    await contribute(two, signed, seed=1, weight=1)
    assert (await one.plan(after=0)).plan.round == 1
    assert kept()
    assert any("until nobody reads" in e.detail for e in site.events if isinstance(e, events.WorkFailed))
    reader.close()
    for _ in range(100):
        if not kept():
            break
        await asyncio.sleep(0.05)
    assert not kept()


@pytest.mark.parametrize(("name", "silent", "asked"), [("local_kill", None, 0.3), ("example_share", 1.0, 0.5)])
async def test_devices_are_told_what_to_leave_out(
    name: str, silent: float | None, asked: float, tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """Still modules, examples: by every plan, where the config says so; any other plan has no such field."""
    for value in (silent, asked):
        folder = tmp_path / str(value)
        folder.mkdir()
        site = Site.make(folder)
        training = msgspec.structs.replace(site.config.training, **{name: value})
        site.config = msgspec.structs.replace(site.config, training=training)
        await site.start()
        signed = await (await site.device(session, "one")).plan()
        await site.close()
        assert (name.encode() in signed.data) == (value == asked)
        assert getattr(signed.plan.training, name) == (asked if value == asked else msgspec.UNSET)


async def test_learning_rates_fall_over_the_rounds(site: Site, session: aiohttp.ClientSession) -> None:
    """Each plan carries its round's share of the configured rates: all of them first, a tenth in the last round."""
    one, two = await site.device(session, "one"), await site.device(session, "two")
    shares = []
    for round_ in range(3):
        signed = await one.plan(after=round_ - 1)
        shares.append(signed.plan.training.lr_b / site.config.training.lr_b)
        for device in (one, two):
            await contribute(device, signed, seed=round_, weight=10)
    assert shares == pytest.approx([1.0, 0.55, 0.1])
