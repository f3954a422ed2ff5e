"""Modules that stand still: the rule by itself, and that a training which keeps it is what it says.

The oracle for a whole training is one step after another with the engine, its gradients applied by a textbook AdamW in
float64 that knows nothing of windows or pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.bundle import Array, Bundle
from edge_runtime.data import Dataset, training_batches
from edge_runtime.engine.adamw import AdamW
from edge_runtime.engine.model import BlockEngine
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.engine.remembered import RememberedHidden
from edge_runtime.training.job import Event, Notice, Stilled
from edge_runtime.training.local import Course, train
from edge_runtime.training.round import run_round
from edge_runtime.training.session import WorkingBundle
from edge_runtime.training.stillness import Stillness, movement, stands_still, window_steps
from edge_runtime.wire import Layout, Training, decode_update
from tests.edge.training.random_learning import random_parameters
from tests.edge.training.test_round import make_job, make_plan

RATE = 1e-2
BLUNT = 1e-2  # eps: a module with small gradients moves little, as with plain gradient descent
EXACT = 2e-4  # of the change: float32 against float64, and AdamW divides by gradients near zero


# -- the rule ---------------------------------------------------------------------------------------------------------


def test_a_window_is_a_quarter_of_an_epoch() -> None:
    assert [window_steps(n) for n in (1, 16, 17, 40, 400)] == [4, 4, 5, 10, 100]


def test_movement_is_in_steps_of_each_rate() -> None:
    """Two tensors of one module with different rates, all elements as far as they reach, and one that cannot move."""
    layout = Layout((("m.lora_a", (2, 3)), ("m.lora_b", (4, 2)), ("n.lora_a", (1, 5)), ("head.bias", (2,))))
    before = np.random.default_rng(0).normal(size=layout.count).astype(np.float32)
    after = before.copy()
    parts = layout.split(after)
    parts["m.lora_a"] += 0.5 * 0.1 * 8  # half of what eight steps at 0.1 reach
    parts["m.lora_b"] -= 0.5 * 0.02 * 8
    parts["head.bias"] += 9.0
    reach = {"m.lora_a": 0.1 * 8, "m.lora_b": 0.02 * 8, "n.lora_a": 0.0, "head.bias": 1.0}
    found = movement(layout, before, after, reach)
    assert set(found) == {"m", "n"}
    assert found["m"] == pytest.approx(0.5, rel=1e-4)
    assert found["n"] == 0.0


def test_the_fastest_is_spared_only_where_nothing_else_is_trained() -> None:
    moved = {"a": 0.1, "b": 0.3, "c": 0.2}
    assert stands_still(moved, 0.25, spare_one=True) == {"a", "c"}
    assert stands_still(moved, 0.5, spare_one=True) == {"a", "c"}
    assert stands_still(moved, 0.5, spare_one=False) == {"a", "b", "c"}
    assert stands_still(moved, 0.1, spare_one=True) == frozenset()
    assert stands_still({}, 0.5, spare_one=True) == frozenset()


def watched(threshold: float | None, *, head: bool = True) -> tuple[AdapterParameters, Stillness]:
    """Three modules of one factor each, four steps a window."""
    blocks = [(f"{name}.lora_b", (3, 2)) for name in "abc"] + ([("head.bias", (2,))] if head else [])
    adapter = {name: np.zeros(shape, np.float32) for name, shape in blocks}
    parameters = AdapterParameters(adapter, Layout(tuple(blocks)))
    training = Training(batch_size=1, max_tokens=8, lr_a=0.1, lr_b=0.1, lr_head=0.1, epochs=1)
    if threshold is not None:
        training = msgspec.structs.replace(training, local_kill=threshold)
    return parameters, Stillness(parameters, training, window=4)


def steps(
    parameters: AdapterParameters, watch: Stillness, speeds: Mapping[str, float], share: float = 1.0
) -> list[set[str]]:
    """Four steps in which modules move by these parts of their rates; what was found after each."""
    found = []
    for _ in range(4):
        for name, speed in speeds.items():
            parameters.tensors[f"{name}.lora_b"][...] += np.float32(0.1 * speed * share)
        found.append(set(watch.after_step(share)))
    return found


def test_modules_are_measured_by_the_first_window() -> None:
    """Their mean moved 0.5 then; later half of that is judged, however fast or slow the others have become."""
    parameters, watch = watched(0.5)
    assert steps(parameters, watch, {"a": 1.0, "b": 0.4, "c": 0.1}) == [set(), set(), set(), {"c"}]
    assert watch.skipped == 0
    assert steps(parameters, watch, {"a": 0.9, "b": 0.3, "c": 0.0})[-1] == set()  # c is not found again
    assert watch.skipped == 4
    assert steps(parameters, watch, {"a": 0.2, "b": 0.26, "c": 0.0})[-1] == {"a"}
    assert steps(parameters, watch, {"a": 0.0, "b": 0.24, "c": 0.0})[-1] == {"b"}  # the head goes on
    assert watch.still == {"a", "b", "c"}
    assert watch.skipped == 4 + 4 + 8


def test_a_falling_rate_is_not_standing_still() -> None:
    parameters, watch = watched(0.5)
    for share in (1.0, 0.5, 0.1):
        assert steps(parameters, watch, dict.fromkeys("abc", 0.8), share)[-1] == set()


def test_one_goes_on_where_there_is_no_head() -> None:
    parameters, watch = watched(0.9, head=False)
    assert steps(parameters, watch, {"a": 0.3, "b": 0.3, "c": 0.3})[-1] == set()
    assert steps(parameters, watch, {"a": 0.1, "b": 0.2, "c": 0.1})[-1] == {"a", "c"}
    assert steps(parameters, watch, {"a": 0.0, "b": 0.0, "c": 0.0})[-1] == set()


def test_nothing_is_watched_unless_asked_for() -> None:
    parameters, watch = watched(None)
    for _ in range(3):
        assert steps(parameters, watch, {"a": 1.0, "b": 0.0, "c": 0.0}) == [set()] * 4
    assert (watch._before, watch.skipped) == (None, 0)


# -- the optimizer ----------------------------------------------------------------------------------------------------


def test_freezing_leaves_the_others_as_they_were() -> None:
    """To the bit, with pieces larger and smaller than a tensor; what is frozen keeps its values, whatever pulls."""
    rng = np.random.default_rng(1)
    shapes = {"a.lora_a": (3, 5), "a.lora_b": (300, 250), "b.lora_b": (4, 2), "c.lora_b": (7, 3), "head.bias": (2,)}
    adapter = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    training = Training(batch_size=1, max_tokens=8, lr_a=0.1, lr_b=0.2, lr_head=0.3, epochs=1, mu=0.1, weight_decay=0.1)
    layout = Layout(tuple(shapes.items()))
    frozen, whole = (AdapterParameters(adapter, layout) for _ in range(2))
    optimizers = [AdamW(frozen, training), AdamW(whole, training)]
    still = {"a.lora_b", "c.lora_b"}
    kept: dict[str, Array] = {}
    for step in range(6):
        if step == 3:
            optimizers[0].freeze(still)
            kept = {name: frozen.tensors[name].copy() for name in still}
        gradients = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        optimizers[1].step(gradients)
        optimizers[0].step({n: g for n, g in gradients.items() if step < 3 or n not in still})
    for name in shapes:
        np.testing.assert_array_equal(frozen.tensors[name], kept.get(name, whole.tensors[name]))
        assert name not in still or (frozen.tensors[name] != whole.tensors[name]).any()


# -- a whole training -------------------------------------------------------------------------------------------------


def settings(threshold: float | None, **changes: float) -> Training:
    training = Training(batch_size=4, max_tokens=64, lr_a=RATE, lr_b=RATE, lr_head=RATE, epochs=6)
    changes = changes if threshold is None else {**changes, "local_kill": threshold}
    return msgspec.structs.replace(training, **changes)


def course(dataset: Dataset, training: Training, memory: RememberedHidden | None = None) -> Course:
    return Course(dataset, training, np.random.default_rng(0), remembered=memory)


def oracle(
    engine: BlockEngine,
    parameters: AdapterParameters,
    of: Course,
    frozen: Callable[[int], set[str]],
) -> dict[str, Array]:
    """Every tensor after all steps; ``frozen(step)`` are not moved from that step (counted from 0) on."""
    training = of.training
    value = {name: parameters.tensors[name].astype(np.float64) for name in parameters.alive}
    first = {name: np.zeros_like(array) for name, array in value.items()}
    second = {name: np.zeros_like(array) for name, array in value.items()}
    engine.use(parameters)  # everything stays alive for it
    for step, batch in enumerate(training_batches(of.dataset, training.batch_size, steps=of.steps, rng=of.rng)):
        gradients = engine.gradients(batch).tensors
        for name in value.keys() - frozen(step):
            gradient = gradients[name].astype(np.float64)
            first[name] = training.beta1 * first[name] + (1 - training.beta1) * gradient
            second[name] = training.beta2 * second[name] + (1 - training.beta2) * gradient**2
            mean = first[name] / (1 - training.beta1 ** (step + 1))
            root = np.sqrt(second[name] / (1 - training.beta2 ** (step + 1)))
            value[name] -= RATE * mean / (root + training.eps) if "lora_a" not in name or training.lr_a else 0.0
            parameters.tensors[name][...] = value[name]
    return {name: array.copy() for name, array in parameters.tensors.items()}


def alive_slots(engine: BlockEngine) -> set[tuple[int, str, str]]:
    return {(block, *slot) for block, variant in enumerate(engine._variants) for slot in variant.alive}


def test_a_module_that_cannot_move_is_dropped_from_the_engine(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset
) -> None:
    """A rate of zero for A: the lowest block trains A alone, the others B, so the backward pass ends a block higher."""
    blocks = {module.name: module.block for module in bundle.manifest.modules}
    lowest = {name for name, block in blocks.items() if block == 0}

    def alive(name: str) -> bool:
        module, factor, letter = name.rpartition(".lora_")
        return not factor or letter == ("a" if module in lowest else "b")

    parameters = random_parameters(bundle, alive)
    training = settings(0.01, lr_a=0.0)
    told: list[tuple[int, frozenset[str]]] = []
    heights: list[int] = []
    trained = train(
        engine,
        parameters,
        course(dataset, training),
        on_step=lambda step, of, loss: heights.append(engine.lowest_alive),
        on_still=lambda step, modules: told.append((step, modules)),
    )
    assert told == [(4, lowest)]
    assert heights == [0] * 4 + [1] * (trained.steps - 4)
    assert trained.skipped == (trained.steps - 4) * len(lowest)
    assert {block for block, _, _ in alive_slots(engine)} == {1, 2}
    again = random_parameters(bundle, alive)
    wanted = oracle(engine, again, course(dataset, training), lambda step: set())
    check_same(parameters, wanted)
    assert parameters.layout.blocks == again.layout.blocks  # what is sent is what the plan asked for


def check_same(parameters: AdapterParameters, wanted: Mapping[str, Array]) -> None:
    for name, shape in parameters.layout.blocks:
        change = wanted[name] - parameters.origin[name]
        off = np.linalg.norm(parameters.tensors[name] - wanted[name])
        assert off <= EXACT * max(float(np.linalg.norm(change)), RATE * np.sqrt(np.prod(shape)) / 10), name


@pytest.mark.parametrize("remembers", [False, True], ids=["computed", "remembered"])
def test_the_rest_trains_as_if_still_modules_were_frozen(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset, tmp_path: Path, remembers: bool
) -> None:
    """Blunt steps, so that modules differ; the lowest block is dead from the start, others are left by and by."""
    blocks = {module.name: module.block for module in bundle.manifest.modules}

    def alive(name: str) -> bool:
        return blocks.get(name.rpartition(".lora_")[0], 9) >= 1

    training = settings(0.6, eps=BLUNT)
    memory = RememberedHidden(tmp_path, max_bytes=1 << 20) if remembers else None
    parameters = random_parameters(bundle, alive)
    told: dict[int, frozenset[str]] = {}
    sizes: list[int] = []
    trained = train(
        engine,
        parameters,
        course(dataset, training, memory),
        on_step=lambda step, of, loss: sizes.append(len(alive_slots(engine))),
        on_still=lambda step, modules: told.update({step: modules}),
    )
    assert len(told) > 1
    assert min(told) == 4
    left = set().union(*told.values())
    assert 0 < len(left) < len({name for name, block in blocks.items() if block >= 1})
    assert trained.skipped == sum((trained.steps - step) * len(modules) for step, modules in told.items())
    for step, modules in told.items():  # both factors of each are out of the graphs from the next step on
        assert sizes[step] == sizes[step - 1] - 2 * len(modules)

    def frozen(step: int) -> set[str]:
        modules = {module for at, found in told.items() if at <= step for module in found}
        return {f"{module}.lora_{letter}" for module in modules for letter in "ab"}

    wanted = oracle(engine, random_parameters(bundle, alive), course(dataset, training), frozen)
    if remembers:
        assert memory is not None
        assert memory.used_bytes > 0
        found, change = parameters.change(), AdapterParameters(wanted, parameters.layout).flat
        change = change - random_parameters(bundle, alive).flat
        assert np.linalg.norm(found - change) / np.linalg.norm(change) < 5e-3
    else:
        check_same(parameters, wanted)


def test_what_was_found_is_what_moved_least(bundle: Bundle, engine: BlockEngine, dataset: Dataset) -> None:
    """The first window by hand: the same modules, from nothing but the engine and numpy."""
    training = settings(0.6, eps=BLUNT)
    told: list[frozenset[str]] = []
    parameters = random_parameters(bundle, lambda name: True)
    train(engine, parameters, course(dataset, training), on_still=lambda step, modules: told.append(modules))
    start = random_parameters(bundle, lambda name: True)
    before = {name: start.tensors[name].copy() for name in start.alive}
    short = msgspec.structs.replace(training, epochs=None, steps=4)
    after = oracle(engine, start, course(dataset, short), lambda step: set())
    moved = {}
    for module in bundle.manifest.module_names:
        names = [f"{module}.lora_{letter}" for letter in "ab"]
        change = np.concatenate([(after[name] - before[name]).ravel() for name in names])
        moved[module] = np.sqrt(np.mean(np.square(change, dtype=np.float64))) / (4 * RATE)
    usual = np.mean(list(moved.values()))
    assert told[0] == {name for name, much in moved.items() if much < 0.6 * usual}


@pytest.mark.parametrize("threshold", [None, 1e-9], ids=["not asked for", "nothing is so still"])
def test_without_still_modules_nothing_changes(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset, threshold: float | None
) -> None:
    """To the bit what the engine and the optimizer make by themselves."""
    parameters, plain = (random_parameters(bundle, lambda name: True) for _ in range(2))
    trained = train(engine, parameters, course(dataset, settings(threshold)))
    of = course(dataset, settings(None))
    engine.use(plain)
    optimizer = AdamW(plain, of.training)
    for batch in training_batches(of.dataset, 4, steps=of.steps, rng=of.rng):
        optimizer.step(engine.gradients(batch).tensors)
    np.testing.assert_array_equal(parameters.flat, plain.flat)
    assert trained.skipped == 0


def test_without_a_head_one_module_goes_on(bundle: Bundle, engine: BlockEngine, dataset: Dataset) -> None:
    parameters = random_parameters(bundle, lambda name: ".lora_" in name)
    told: list[frozenset[str]] = []
    train(engine, parameters, course(dataset, settings(1.0)), on_still=lambda step, modules: told.append(modules))
    assert sum(map(len, told)) == len(bundle.manifest.module_names) - 1
    assert len({module for module, _, _ in alive_slots(engine)}) == 1


def test_a_round_tells_and_its_frame_has_all_blocks(bundle: Bundle, tmp_path: Path) -> None:
    plan = make_plan(bundle, "AB", steps=12, eps=BLUNT, local_kill=0.6)
    job, signed = make_job(tmp_path, bundle, plan)
    events: list[Event] = []
    frame, done = run_round(job, events.append)
    layout = WorkingBundle(bundle).plan_layout(signed.plan)
    parts = layout.split(decode_update(frame, signed_plan=signed, layout=layout).values)
    stilled = [event for event in events if isinstance(event, Stilled)]
    assert stilled
    assert done.skipped == sum((12 - event.step) * len(event.modules) for event in stilled) > 0
    assert set(stilled[0].modules) < set(bundle.manifest.module_names)
    for name in stilled[0].modules:  # what it moved until then is in the update
        assert parts[f"{name}.lora_b"].any()
    assert not [event for event in events if isinstance(event, Notice) and "still" in event.text]
