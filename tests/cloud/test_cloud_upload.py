"""Tasks whose updates are quantised: where the ranges come from, and that they are replayed."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import pytest
from cloud_fleet import Device, Site, make_bundle, values_for
from hypothesis import given
from hypothesis import strategies as st

from cloud.aggregate import largest_changes, rms_changes
from cloud.planner import PastRound, ternary_ranges, update_ranges
from cloud.planning import plan_layout
from edge_runtime import wire
from edge_runtime.bundle import adapter_shapes, parse_tensors
from edge_runtime.training.carried import fitting
from edge_runtime.training.quantise import quantise
from tests.cloud.test_cloud_replay import replay

TRAINING = wire.Training(batch_size=1, max_tokens=8, lr_a=1e-3, lr_b=4e-3, lr_head=2e-3, epochs=2)
NAMES = ("q.lora_a", "q.lora_b", "classifier.bias")
B_AND_HEAD = ["layer.0.q.lora_b", "layer.0.v.lora_b", "layer.1.q.lora_b", "layer.1.v.lora_b"]
HEAD = ["classifier.weight", "classifier.bias"]


def past(training: wire.Training = TRAINING, **largest: float) -> PastRound:
    """A round that moved the tensors of these names, dots written as two underscores."""
    return PastRound(
        (), {}, largest={name.replace("__", "."): most for name, most in largest.items()}, training=training
    )


def ranges(*rounds: PastRound, training: wire.Training = TRAINING, max_abs: float = 8.0) -> tuple[float, ...]:
    return update_ranges(NAMES, training, rounds, max_abs=max_abs)


def test_tensors_that_never_moved_get_rate_times_steps() -> None:
    assert ranges() == (0.032, 0.128, 0.064)  # two epochs of sixteen steps
    assert ranges(training=msgspec.structs.replace(TRAINING, steps=5, epochs=None)) == (0.005, 0.02, 0.01)
    assert ranges(past(q__lora_a=0.01))[1:] == (0.128, 0.064)


def test_tensors_that_moved_get_what_they_moved_and_headroom() -> None:
    """The last round that moved a tensor decides, in proportion to the rates of then and now."""
    half = msgspec.structs.replace(TRAINING, lr_a=5e-4, lr_b=2e-3, lr_head=1e-3)
    rounds = past(q__lora_a=0.5, q__lora_b=0.5), past(q__lora_a=0.0123456), past(q__lora_b=0.01, classifier__bias=0.02)
    assert ranges(*rounds) == (0.0309, 0.025, 0.05)
    assert ranges(*rounds, training=half) == (0.0154, 0.0125, 0.025)


def test_steps_bound_a_range_from_above_and_one_step_from_below() -> None:
    five = msgspec.structs.replace(TRAINING, steps=5, epochs=None)
    moved = past(five, q__lora_a=0.9, q__lora_b=1e-9, classifier__bias=0.9)
    assert ranges(moved, training=five) == (0.005, 0.004, 0.01)
    assert ranges(moved) == (2.25, 0.004, 2.25)  # epochs bound nothing
    assert ranges(moved, max_abs=0.5) == (0.5, 0.004, 0.5)


def test_rates_of_zero_still_give_a_range() -> None:
    still = msgspec.structs.replace(TRAINING, lr_a=0.0, lr_b=0.0, lr_head=0.0)
    assert ranges(training=still) == (1e-6, 1e-6, 1e-6)
    assert ranges(past(q__lora_a=1.0), training=still)[0] == 1e-6
    assert ranges(past(still, q__lora_a=1.0))[0] == 0.032  # by which rate it moved is not known


@given(
    st.floats(0, 1), st.none() | st.integers(1, 10**6), st.lists(st.floats(0, 1e3), max_size=3), st.floats(1e-6, 1e3)
)
def test_a_plan_may_always_carry_them(rate: float, steps: int | None, moved: list[float], max_abs: float) -> None:
    epochs = 1 if steps is None else None
    training = msgspec.structs.replace(TRAINING, lr_a=rate, lr_b=rate, lr_head=rate, steps=steps, epochs=epochs)
    rounds = [past(training, q__lora_a=value) for value in moved]
    for range_ in ranges(*rounds, training=training, max_abs=max_abs):
        assert 0 < range_ <= max_abs
        assert range_ == max_abs or len(f"{range_:e}".split("e")[0].rstrip("0").replace(".", "")) <= 3


def ternary(rms: float = 0.0, *, devices: int = 5, **changes: object) -> tuple[float, ...]:
    training = msgspec.structs.replace(TRAINING, **changes)
    rounds = [PastRound((), {}, training=TRAINING, rms={"q.lora_b": rms})] if rms else []
    return ternary_ranges(NAMES, training, rounds, max_abs=8.0, devices=devices)


def test_ternary_ranges_begin_with_steps_that_are_unrelated() -> None:
    assert ternary() == (0.00692, 0.0277, 0.0138)  # 1.224 · rate · √32
    assert ternary(steps=4, epochs=None) == (0.00245, 0.00979, 0.0049)
    assert ternary(lr_a=0.0) == (1e-6, 0.0277, 0.0138)


def test_ternary_ranges_follow_what_a_mean_of_so_many_devices_moved() -> None:
    assert ternary(0.01)[1] == 0.0304  # 0.01 · √(5 / 0.54)
    assert ternary(0.01, devices=20)[1] == 0.0609
    assert ternary(0.01, lr_b=2e-3)[1] == 0.0152  # at half the rate
    assert ternary(0.01)[::2] == ternary()[::2]  # the others have not moved
    assert ternary(100.0)[1] == 8.0


@pytest.mark.parametrize("alike", [0.0, 0.5])  # the share of a change's variance that all devices have in common
@pytest.mark.parametrize("start", [0.2, 1.0, 5.0])
def test_a_ternary_range_settles_from_both_sides(start: float, alike: float) -> None:
    """Near the best step of unrelated changes; where devices agree larger, but never beyond √devices times that."""
    rng, devices, count = np.random.default_rng(2), 5, 4000
    range_, residuals = start, [{} for _ in range(devices)]
    for _ in range(12):
        common, sent = rng.normal(size=count), []
        layout = wire.Layout((("q.lora_b", (count, 1)),), wire.Quantisation(2, (range_,)))
        for device, residual in enumerate(residuals):
            change = np.sqrt(alike) * common + np.sqrt(1 - alike) * rng.normal(size=count)
            found = quantise(change.astype(np.float32), layout, residual, rng=rng)
            residuals[device] = found.residual
            sent.append(found.values)
        rms = float(np.sqrt(np.mean(np.mean(sent, axis=0) ** 2)))
        past_round = PastRound((), {}, training=TRAINING, rms={"q.lora_b": rms} if rms else {})
        range_ = ternary_ranges(["q.lora_b"], TRAINING, [past_round], max_abs=100.0, devices=devices)[0]
    assert 0.8 * 1.224 < range_ < (1.6 if not alike else 2.3) * 1.224


def test_largest_changes_are_those_of_the_tensors_that_moved() -> None:
    before = {"a": np.array([[1.0, -2.0, 0.5]], np.float32), "b": np.ones(2, np.float32)}
    after = {"a": np.array([[1.25, -2.5, 0.5]], np.float32), "b": np.ones(2, np.float32)}
    assert largest_changes(before, after) == {"a": 0.5}
    assert rms_changes(before, after) == {"a": pytest.approx(math.sqrt((0.25**2 + 0.5**2) / 3))}


class Learner:
    """A device that rounds its changes, and keeps what it did not send."""

    def __init__(self, device: Device, seed: int) -> None:
        self.device, self.residual, self.rng = device, {}, np.random.default_rng(seed)
        self.sent_bytes = 0

    async def contribute(self, signed: wire.SignedPlan, seed: int) -> np.ndarray:
        """Send a random change for the plan; what it was rounded to."""
        layout = plan_layout(self.device.site.bundle, signed.plan)
        change = values_for(self.device.site, signed, seed) / 10
        left, _ = fitting(self.residual, adapter_shapes(self.device.site.bundle.manifest, signed.plan.ranks))
        found = quantise(change, layout, left, rng=self.rng)
        self.residual = found.residual
        sealed = self.device.seal(signed, self.device.frame(signed, found.values))
        assert len(sealed) == layout.frame_bytes + 48
        assert (await self.device.put(signed, sealed)).status == 201
        self.sent_bytes += len(sealed)
        return found.values


async def run_task(site: Site, session: aiohttp.ClientSession) -> tuple[list[wire.Plan], list[Learner]]:
    """Every plan, the last one too; an adapter is the one before moved by the plain average of what was sent."""
    learners = [Learner(await site.device(session, name), number) for number, name in enumerate(("one", "two"))]
    first = learners[0].device
    signed, expected, plans = await first.plan(), None, []
    while True:
        adapter = parse_tensors((await first.blob(signed.plan.adapter)).body, what="adapter")
        for name, array in (expected or {}).items():
            if adapter[name].shape == array.shape:  # else its rank was changed
                np.testing.assert_allclose(adapter[name], array, atol=1e-6)
        plans.append(signed.plan)
        if signed.plan.state == "finished":
            return plans, learners
        sent = [await learner.contribute(signed, 10 * signed.plan.round + n) for n, learner in enumerate(learners)]
        moved = plan_layout(site.bundle, signed.plan).split(np.mean(sent, axis=0, dtype=np.float64))
        expected = {name: array + moved.get(name, 0) for name, array in adapter.items()}
        signed = await first.plan(after=signed.plan.round)


@pytest.mark.parametrize(("upload", "bits"), [("int8", 8), ("int4", 4), ("ternary", 2)])
async def test_a_quantised_task_ends_with_the_average(
    tmp_path: Path, session: aiohttp.ClientSession, upload: str, bits: int
) -> None:
    """Ranges of the first plan are the assumed ones, later ones follow what moved; bytes are those that were sent."""
    site = Site.make(tmp_path, rounds=6, upload=upload)
    await site.start()
    plans, learners = await run_task(site, session)
    assert [plan.quantisation.bits for plan in plans[:-1]] == [bits] * 6
    assert plans[-1].quantisation is msgspec.UNSET
    steps = 1.224 * 4 if upload == "ternary" else 16  # what sixteen add up to, unrelated ones or all alike
    first = plans[0].quantisation.ranges[0]
    assert plans[0].quantisation.ranges == (pytest.approx(steps * 2e-3, rel=0.005),) * 6  # B and head alike
    assert plans[1].quantisation.ranges[:4] == (pytest.approx(steps * 4.57e-4, rel=0.005),) * 4  # A, never alive
    assert all(range_ != first for plan in plans[2:-1] for range_ in plan.quantisation.ranges)
    status = await site.operator.status()
    assert status.bytes_up == sum(learner.sent_bytes for learner in learners)
    await site.close()
    assert (await replay(site)).exit_code == 0


@pytest.mark.parametrize(("upload", "density"), [("int8", 0.5), ("int4", 0.1), ("ternary", 0.5)])
async def test_a_sparse_task_ends_with_the_average(
    tmp_path: Path, session: aiohttp.ClientSession, upload: str, density: float
) -> None:
    """Of what the devices sent, which is a share of what they learned; plans are made again as they were."""
    site = Site.make(tmp_path, rounds=4, upload=upload, upload_density=density)
    await site.start()
    plans, learners = await run_task(site, session)
    assert [plan.quantisation.density for plan in plans[:-1]] == [density] * 4
    layout = plan_layout(site.bundle, plans[0])
    assert layout.held == math.ceil(density * layout.count) < layout.count
    assert all(learner.residual for learner in learners)
    status = await site.operator.status()
    assert status.bytes_up == sum(learner.sent_bytes for learner in learners)
    await site.close()
    assert (await replay(site)).exit_code == 0
    path = site.folder / "emberlora.toml"
    path.write_text(path.read_text().replace(f"upload_density = {density}", "upload_density = 1.0"))
    assert (await replay(site)).stdout.count(f"upload density: signed {density}, replayed 1") == 4


async def test_ranges_follow_the_mean_that_was_applied(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """2.5 times the largest change of the tensor's last round, as the rates fell, whatever its rank is now."""
    annealing = {"budget_end": 0.4, "initiating_rounds": 2, "final_rounds": 1}
    bundle = make_bundle(tmp_path / "bundle", r_max=3)
    site = Site.make(tmp_path, bundle=bundle, rounds=7, upload="int8", policy="anneal", annealing=annealing)
    await site.start()
    plans, _ = await run_task(site, session)
    with sqlite3.connect(site.config.data_path / "emberlora.sqlite3") as database:
        kept = [json.loads(row[0])["largest"] for row in database.execute("SELECT evidence FROM rounds ORDER BY round")]
    assert kept[0] == {}
    assert set(kept[1]) == {*B_AND_HEAD, *HEAD}  # what round 0 moved
    cut = next(number for number, plan in enumerate(plans) if plan.ranks != plans[0].ranks)
    for plan in (plans[2], plans[cut]):
        names = [name for name, _ in plan_layout(bundle, plan).blocks]
        made = dict(zip(names, plan.quantisation.ranges, strict=True))
        then = plans[plan.round - 2].training
        for name in B_AND_HEAD:
            share = plan.training.lr_b / then.lr_b
            wanted = max(2.5 * kept[plan.round - 1][name] * share, plan.training.lr_b)
            assert made[name] == pytest.approx(wanted, rel=0.006)
    await site.close()
    found = await replay(site)
    assert found.exit_code == 0, found.output
    assert found.stdout.count("as signed") == 7


async def test_replay_notices_another_range_and_another_upload(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    site = Site.make(tmp_path, rounds=4, upload="int4")
    await site.start()
    await run_task(site, session)
    await site.close()
    with sqlite3.connect(site.config.data_path / "emberlora.sqlite3") as database:
        (text,) = database.execute("SELECT evidence FROM rounds WHERE round = 1").fetchone()
        evidence = json.loads(text)
        evidence["largest"]["layer.0.q.lora_b"] *= 3
        database.execute("UPDATE rounds SET evidence = ? WHERE round = 1", (json.dumps(evidence),))
    found = await replay(site)
    assert found.exit_code == 1
    assert found.stdout.count("as signed") == 3
    assert found.stdout.count("signed range") == 1
    assert "layer.0.q.lora_b: signed range 0." in found.stdout
    path = site.folder / "emberlora.toml"
    path.write_text(path.read_text().replace('upload = "int4"', 'upload = "int8"'))
    assert (await replay(site)).stdout.count("upload: signed int4, replayed int8") == 4
    path.write_text(path.read_text().replace('upload = "int8"', 'upload = "float32"'))
    assert (await replay(site)).stdout.count("upload: signed int4, replayed float32") == 4


async def test_float32_is_the_default_and_says_nothing_of_quantisation(
    site: Site, session: aiohttp.ClientSession
) -> None:
    one = await site.device(session, "one")
    signed = await one.plan()
    assert signed.plan.quantisation is msgspec.UNSET
    assert b"quantisation" not in signed.data
    sealed = one.seal(signed, one.frame(signed, values_for(site, signed, 1)))
    assert len(sealed) == 148 + 4 * plan_layout(site.bundle, signed.plan).count + 48


async def test_a_float_update_is_too_long_for_a_plan_that_quantises(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """It is refused before its body is read, as it has another length than the plan says."""
    site = Site.make(tmp_path, upload="int8")
    await site.start()
    one = await site.device(session, "one")
    signed = await one.plan()
    layout = plan_layout(site.bundle, signed.plan)
    plain = wire.Update(values_for(site, signed, 0), 1)
    frame = wire.encode_update(plain, signed_plan=signed, layout=wire.Layout(layout.blocks))
    answer = await one.put(signed, one.seal(signed, frame))
    assert (answer.status, answer.problem()) == (422, "UpdateFormatError")
    assert f"{layout.frame_bytes + 48}" in answer.body.decode()
    await site.close()


async def test_quantised_updates_survive_a_restart(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """Stored updates are opened and summed again by the plan that asked for them, whatever the config says now."""
    site = Site.make(tmp_path, rounds=1, upload="int4")
    await site.start()
    learners = [Learner(await site.device(session, name), number) for number, name in enumerate(("one", "two"))]
    signed = await learners[0].device.plan()
    start = parse_tensors((await learners[0].device.blob(signed.plan.adapter)).body, what="adapter")
    sent = [await learners[0].contribute(signed, 1)]
    site.config = msgspec.structs.replace(site.config, task=msgspec.structs.replace(site.config.task, upload="float32"))
    await site.restart()
    sent.append(await learners[1].contribute(signed, 2))
    last = await learners[0].device.plan(after=0)
    end = parse_tensors((await learners[0].device.blob(last.plan.adapter)).body, what="adapter")
    for name, change in plan_layout(site.bundle, signed.plan).split(np.mean(sent, axis=0, dtype=np.float64)).items():
        np.testing.assert_allclose(end[name], start[name] + change, atol=1e-6)
    await site.close()
