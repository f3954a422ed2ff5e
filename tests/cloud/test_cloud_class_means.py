"""A head from class means: the closed form against a slow one, its limits, and whole tasks that begin with it."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from cloud_fleet import Device, Site, make_bundle, values_for
from hypothesis import given
from hypothesis import strategies as st

from cloud import events
from cloud.aggregate import UpdateSum, linear_discriminant
from cloud.commands import cloud
from cloud.console import describe, headline
from cloud.errors import ConfigError
from cloud.measuring import measuring_layout, measuring_rules
from cloud.planner import update_ranges
from cloud.planning import check_fit, plan_layout
from edge_runtime import wire
from edge_runtime.bundle import Param, parse_tensors

CLASSES, FEATURES = 4, 5


def examples(seed: int, count: int = 200, *, apart: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated Gaussians around random means; every class but the last of CLASSES + 1 has some."""
    rng = np.random.default_rng(seed)
    mixing, means = rng.normal(size=(FEATURES, FEATURES)), apart * rng.normal(size=(CLASSES, FEATURES))
    labels = np.arange(count) % CLASSES
    return means[labels] + rng.normal(size=(count, FEATURES)) @ mixing, labels


def sums_of(inputs: np.ndarray, labels: np.ndarray, classes: int = CLASSES) -> tuple[np.ndarray, ...]:
    """One example after the other."""
    sums, counts = np.zeros((classes, inputs.shape[1])), np.zeros(classes)
    moments = np.zeros((inputs.shape[1], inputs.shape[1]))
    for row, label in zip(inputs, labels, strict=True):
        sums[label] += row
        counts[label] += 1
        moments += np.outer(row, row)
    return sums, counts, moments


def slow_logits(inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log densities of Gaussians with one shrunk covariance, less the first class's, at every input; by inversion."""
    means = np.stack([inputs[labels == label].mean(axis=0) for label in range(CLASSES)])
    freedom, size = len(inputs) - CLASSES, inputs.shape[1]
    covariance = sum(np.outer(x - means[y], x - means[y]) for x, y in zip(inputs, labels, strict=True)) / freedom
    trace, squares = np.trace(covariance), np.trace(covariance @ covariance)
    shrinkage = ((1 - 2 / size) * squares + trace**2) / ((freedom + 1 - 2 / size) * (squares - trace**2 / size))
    shrunk = (1 - min(shrinkage, 1)) * covariance + min(shrinkage, 1) * trace / size * np.eye(size)
    inverse = np.linalg.inv(shrunk)
    density = np.array([[-(x - mean) @ inverse @ (x - mean) / 2 for mean in means] for x in inputs])
    return density - density[:, :1]


@pytest.mark.parametrize("count", [12, 200])
def test_logits_are_scaled_log_densities(count: int) -> None:
    """With few and with many examples, up to one factor for all of them."""
    inputs, labels = examples(0, count)
    weight, bias = linear_discriminant(*sums_of(inputs, labels))
    assert (weight.dtype, weight.shape, bias.shape) == (np.float32, (CLASSES, FEATURES), (CLASSES,))
    logits = inputs @ weight.T.astype(float) + bias
    logits -= logits[:, :1]
    expected = slow_logits(inputs, labels)
    factor = np.sum(logits * expected) / np.sum(expected**2)
    assert 0 < factor <= 1 + 1e-6
    np.testing.assert_allclose(logits, factor * expected, atol=2e-5 * np.abs(logits).max())


def test_confidence_is_the_models_own_but_bounded() -> None:
    """Classes that overlap keep the Gaussian's logits; where they are far apart the mean lead is 2·ln(classes)."""
    inputs, labels = examples(1, 4000, apart=0.1)
    weight, bias = linear_discriminant(*sums_of(inputs, labels))
    logits = inputs @ weight.T.astype(float) + bias
    np.testing.assert_allclose(logits - logits[:, :1], slow_logits(inputs, labels), atol=1e-4)
    inputs, labels = examples(1, 4000, apart=50.0)
    weight, bias = linear_discriminant(*sums_of(inputs, labels))
    means = np.stack([inputs[labels == label].mean(axis=0) for label in range(CLASSES)])
    logits = means @ weight.T.astype(float) + bias
    assert np.mean(np.diag(logits)) - np.mean(logits) == pytest.approx(2 * math.log(CLASSES), rel=1e-4)


def test_one_example_a_class_is_nearest_mean() -> None:
    """Nothing is known of the spread then, and no direction counts more than another."""
    inputs = np.random.default_rng(2).normal(size=(CLASSES, FEATURES))
    weight, bias = linear_discriminant(*sums_of(inputs, np.arange(CLASSES)))
    others = np.random.default_rng(3).normal(size=(100, FEATURES))
    nearest = ((others[:, None] - inputs) ** 2).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal((others @ weight.T + bias).argmax(axis=1), nearest)


@given(st.integers(0, 50), st.floats(-3, 3))
def test_moving_all_inputs_changes_no_logit(seed: int, shift: float) -> None:
    inputs, labels = examples(seed, 60)
    plain, moved = (linear_discriminant(*sums_of(x, labels)) for x in (inputs, inputs + shift))
    before, after = (x @ w.T.astype(float) + b for x, (w, b) in ((inputs, plain), (inputs + shift, moved)))
    np.testing.assert_allclose(before - before[:, :1], after - after[:, :1], atol=1e-3)


def test_a_class_without_examples_is_the_least_likely() -> None:
    inputs, labels = examples(4, apart=9.0)
    labels = labels + (labels >= 2)  # none of class 2
    weight, bias = linear_discriminant(*sums_of(inputs, labels, CLASSES + 1))
    assert not weight[2].any()
    at_centre = weight.astype(float) @ inputs.mean(axis=0) + bias
    rest = np.delete(at_centre, 2)
    assert at_centre[2] == pytest.approx(rest.min() - math.log(1 + len(inputs)), abs=1e-4)
    assert ((inputs @ weight.T + bias).argmax(axis=1) == labels).mean() > 0.9
    alone, _ = linear_discriminant(*sums_of(inputs[labels == 0], labels[labels == 0], CLASSES + 1))
    assert not alone.any()


@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 2.0**24])
def test_sums_that_contradict_each_other_give_a_finite_head(size: float) -> None:
    """Whatever one device makes up, a head comes out: a round that cannot be applied would stop the task."""
    rng = np.random.default_rng(5)
    for moments in (np.zeros((FEATURES, FEATURES)), -np.eye(FEATURES) * size, np.full((FEATURES, FEATURES), size)):
        for sums in (size * rng.normal(size=(CLASSES, FEATURES)), np.full((CLASSES, FEATURES), size)):
            weight, bias = linear_discriminant(sums, np.array([1.0, 0, 7, 2]), moments)
            assert np.isfinite(weight).all()
            assert np.isfinite(bias).all()


def test_the_rules_fit_and_keep_counts_exact(tmp_path: Path) -> None:
    config = Site.make(tmp_path, head_init="class-means", head_init_devices=2**14).config
    rules = measuring_rules(config)
    assert rules.max_devices == 2**14
    total = UpdateSum(2, rules)
    total.add(np.array([2**24 - 1, -(2.0**24)], np.float32), 999)
    total.add(np.array([1, 2.0**-24], np.float32), 5)
    np.testing.assert_array_equal(total.sums(), [2**24, -(2.0**24) + 2.0**-24])


# Tasks

MEASURED = {"head_init": "class-means", "rounds": 3}


def measured(site: Site, seed: int, count: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A device's answer to a measuring plan, and the examples it is made from."""
    rng = np.random.default_rng(seed)
    classes, features = site.bundle.manifest.head_shapes["classifier.weight"]
    labels = rng.integers(0, classes, size=count)
    inputs = np.tanh(rng.normal(size=(count, features)) + 2 * labels[:, None])
    sums, counts, moments = sums_of(inputs, labels, classes)
    return np.concatenate([sums.ravel(), counts, moments[np.triu_indices(features)]]), inputs, labels


async def measure(site: Site, signed: wire.SignedPlan, devices: list[Device]) -> tuple[np.ndarray, np.ndarray]:
    """Let every device answer; the pooled examples."""
    pools = []
    for number, device in enumerate(devices):
        values, inputs, labels = measured(site, number)
        answer = await device.put(signed, device.seal(signed, device.frame(signed, values, weight=len(labels))))
        assert answer.status == 201, answer
        assert wire.decode_message(answer.body, wire.UpdateReceipt).weight == 1
        pools.append((inputs, labels))
    return np.concatenate([x for x, _ in pools]), np.concatenate([y for _, y in pools])


async def tensors_of(device: Device, signed: wire.SignedPlan) -> dict[str, np.ndarray]:
    return parse_tensors((await device.blob(signed.plan.adapter)).body, what="adapter")


async def train(site: Site, signed: wire.SignedPlan, devices: list[Device]) -> None:
    for number, device in enumerate(devices):
        values = values_for(site, signed, signed.plan.round + number)
        assert (await device.put(signed, device.seal(signed, device.frame(signed, values)))).status == 201


@pytest.mark.parametrize("head", ["trained", "frozen"])
async def test_a_task_measures_first_and_then_trains_as_without(
    tmp_path: Path, session: aiohttp.ClientSession, head: str
) -> None:
    """Round 0 makes the pooled examples' head, then B, A, B with the rates of a task without it; frozen is frozen."""
    site = Site.make(tmp_path, **MEASURED, head=head)
    await site.start()
    devices = [await site.device(session, name) for name in ("one", "two")]
    signed = await devices[0].plan()
    assert (signed.plan.state, signed.plan.round, signed.plan.rounds) == ("measure", 0, 4)
    assert {module.alive for module in signed.plan.modules} == {""}
    assert not signed.plan.head_alive
    status = await site.operator.status()
    assert (status.state, status.rounds) == ("measuring", 4)
    assert "round 1 of 4" in headline(status, now=0.0)
    before = await tensors_of(devices[0], signed)
    inputs, labels = await measure(site, signed, devices)
    signed = await devices[0].plan(after=0)
    adapter = await tensors_of(devices[0], signed)
    weight, bias = linear_discriminant(*sums_of(inputs, labels, 2))
    np.testing.assert_allclose(adapter["classifier.weight"], weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(adapter["classifier.bias"], bias, rtol=1e-4, atol=1e-5)
    assert all(np.array_equal(adapter[name], before[name]) for name in before if "lora" in name)
    shares = []
    for round_ in (1, 2, 3):
        assert (signed.plan.state, signed.plan.round) == ("train", round_)
        assert {module.alive for module in signed.plan.modules} == {"B" if round_ % 2 else "A"}
        assert signed.plan.head_alive == (head == "trained")
        assert signed.plan.update == wire.UpdateRules(max_devices=2)
        shares.append(signed.plan.training.lr_b / site.config.training.lr_b)
        await train(site, signed, devices)
        signed = await devices[0].plan(after=round_)
    assert shares == pytest.approx([1.0, 0.55, 0.1])
    assert (signed.plan.state, signed.plan.round) == ("finished", 4)
    last = await tensors_of(devices[0], signed)
    assert np.array_equal(last["classifier.weight"], adapter["classifier.weight"]) == (head == "frozen")
    history = (await site.operator.status()).history
    assert [(r.state, r.devices, r.weight) for r in history] == [("measure", 2, 2), *[("train", 2, 20)] * 3]
    assert (history[0].loss_start, history[0].loss_end) == (None, None)
    lines = [describe(event) for event in site.events if isinstance(event, events.RoundApplied)]
    assert "round 1 of 4 applied: 2 devices · class means ·" in lines[0]
    assert "class means" not in lines[1]
    await site.close()


async def test_a_restart_while_measuring_changes_nothing(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """What was counted before the stop is in the head, and the next round trains B."""
    site = Site.make(tmp_path, **MEASURED, head_init_devices=3)
    await site.start()
    devices = [await site.device(session, name) for name in ("one", "two", "three")]
    signed = await devices[0].plan()
    assert signed.plan.update.max_devices == 3
    await measure(site, signed, devices[:2])
    await site.restart()
    status = await site.operator.status()
    assert (status.state, status.received, status.wanted) == ("measuring", 2, 3)
    assert (await devices[2].plan()).digest == signed.digest
    values, _, labels = measured(site, 2)
    await devices[2].put(signed, devices[2].seal(signed, devices[2].frame(signed, values, weight=len(labels))))
    signed = await devices[0].plan(after=0)
    assert {module.alive for module in signed.plan.modules} == {"B"}
    adapter = await tensors_of(devices[0], signed)
    pools = [measured(site, number)[1:] for number in range(3)]
    expected, _ = linear_discriminant(
        *sums_of(np.concatenate([x for x, _ in pools]), np.concatenate([y for _, y in pools]), 2)
    )
    np.testing.assert_allclose(adapter["classifier.weight"], expected, rtol=1e-4, atol=1e-5)
    assert (await site.operator.status()).wanted == 2
    await site.restart()
    assert (await devices[0].plan(after=0)).digest == signed.digest
    await site.close()


async def test_measuring_closes_at_the_deadline(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    site = Site.make(tmp_path, **MEASURED, head_init_devices=9, round_deadline_s=100)
    await site.start()
    one = await site.device(session, "one")
    signed = await one.plan()
    await measure(site, signed, [one])
    site.clock.now += 101
    await site.tick()
    assert (await one.plan(after=0)).plan.state == "train"
    await site.close()


@pytest.mark.parametrize(
    ("policy", "initiating"), [("anneal", 2), ("kill-revive", 2), ("kill-revive", 0), ("annealed-kill-revive", 2)]
)
async def test_policies_do_not_see_the_measuring_round(
    tmp_path: Path, session: aiohttp.ClientSession, policy: str, initiating: int
) -> None:
    """With the same updates, a task that measures chooses what one that does not chooses; replay agrees with both."""
    annealing = {"budget_end": 0.5, "initiating_rounds": initiating, "final_rounds": 1, "temperature_start": 5.0}
    chosen = {}
    for head_init in ("bundle", "class-means"):
        folder = tmp_path / head_init
        site = Site.make(
            folder,
            bundle=make_bundle(folder / "bundle"),
            policy=policy,
            rounds=6,
            head_init=head_init,
            annealing=annealing,
        )
        await site.start()
        devices = [await site.device(session, name) for name in ("one", "two")]
        signed = await devices[0].plan()
        if head_init == "class-means":
            await measure(site, signed, devices)
            signed = await devices[0].plan(after=0)
        chosen[head_init] = []
        while signed.plan.state == "train":
            chosen[head_init].append(signed.plan.modules)
            for number, device in enumerate(devices):
                values = values_for(site, signed, len(chosen[head_init]) + 10 * number)
                assert (await device.put(signed, device.seal(signed, device.frame(signed, values)))).status == 201
            signed = await devices[0].plan(after=signed.plan.round)
        await site.close()
        found = await asyncio.to_thread(CliRunner().invoke, cloud, ["replay", "--config", str(site.folder)])
        assert found.exit_code == 0, found.output
        assert found.stdout.count("as signed") == 6 + (head_init == "class-means")
        assert found.stdout.count("measures class means") == (head_init == "class-means")
    assert chosen["bundle"] == chosen["class-means"]
    assert len({json.dumps(str(modules)) for modules in chosen["bundle"]}) > 2


async def test_a_measurement_is_never_quantised(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """Sums are sent as they are; the round that follows is sent in few bits, as the config says."""
    site = Site.make(tmp_path, **MEASURED, upload="int8")
    await site.start()
    devices = [await site.device(session, name) for name in ("one", "two")]
    signed = await devices[0].plan()
    assert not signed.plan.quantisation
    await measure(site, signed, devices)
    signed = await devices[0].plan(after=0)
    assert signed.plan.quantisation
    names = [name for name, _ in plan_layout(site.bundle, signed.plan).blocks]
    assert len(signed.plan.quantisation.ranges) == len(names) == 4 + 2
    expected = update_ranges(names, signed.plan.training, (), max_abs=8.0)  # a head that was measured is no change
    assert signed.plan.quantisation.ranges == expected
    await site.close()
    found = await asyncio.to_thread(CliRunner().invoke, cloud, ["replay", "--config", str(site.folder)])
    assert (found.exit_code, found.stdout.count("as signed")) == (0, 2)


async def test_counts_that_count_no_examples_are_refused(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """By name; nothing of them is summed, and the device may not repeat them as another update."""
    site = Site.make(tmp_path, **MEASURED)
    await site.start()
    one = await site.device(session, "one")
    signed = await one.plan()
    layout = plan_layout(site.bundle, signed.plan)
    assert [name for name, _ in layout.blocks] == [wire.CLASS_SUMS, wire.CLASS_COUNTS, wire.SECOND_MOMENTS]
    values, _, labels = measured(site, 0)
    for change, weight in ((0.5, len(labels)), (1.0, len(labels)), (0.0, len(labels) + 1)):
        wrong = values.copy()
        layout.split(wrong)[wire.CLASS_COUNTS][0] += change
        answer = await one.put(signed, one.seal(signed, one.frame(signed, wrong, weight=weight)))
        assert (answer.status, answer.problem()) == (422, "UpdateValueError")
    assert (await site.operator.status()).received == 0
    await site.close()


async def test_stopping_while_measuring_ends_with_the_bundles_adapter(
    tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    site = Site.make(tmp_path, **MEASURED)
    await site.start()
    one = await site.device(session, "one")
    signed = await one.plan()
    await measure(site, signed, [one])
    assert (await site.operator.stop()).state == "finished"
    last = await one.plan(after=0)
    assert (last.plan.state, last.plan.adapter) == ("finished", signed.plan.adapter)
    await site.close()


@pytest.mark.parametrize(
    ("task", "engine", "message"),
    [
        ("lm", "blocks", "task.head_init is class-means, which needs a linear classifier: the bundle's task is lm"),
        ("classify", "ort-training", "task.head_init is class-means, .* blocks: the bundle's engine is ort-training"),
    ],
)
def test_a_bundle_that_cannot_be_measured_is_refused(tmp_path: Path, task: str, engine: str, message: str) -> None:
    """Both sides of the contradiction are named; without class-means the same bundle fits."""
    bundle = make_bundle(tmp_path / "bundle", task=task)
    bundle = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, engine=engine))
    check_fit(Site.make(tmp_path, bundle=bundle).config, bundle)
    with pytest.raises(ConfigError, match=message):
        check_fit(Site.make(tmp_path / "measuring", bundle=bundle, **MEASURED).config, bundle)


def test_what_a_classifier_is(tmp_path: Path) -> None:
    """A linear layer with a bias, and nothing else; a plan that measures for another head has no layout."""
    lm, classifier = make_bundle(tmp_path / "lm", task="lm"), make_bundle(tmp_path / "classify").manifest
    assert (lm.manifest.head.linear, classifier.head.linear) == (None, (2, 6))
    for params in (classifier.head.params[:1], (*classifier.head.params, Param("scale", (2,))), ()):
        assert msgspec.structs.replace(classifier.head, params=params).linear is None
    with pytest.raises(wire.PlanFormatError, match="no linear classifier"):
        measuring_layout(lm.manifest)
