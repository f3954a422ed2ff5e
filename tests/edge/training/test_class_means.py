"""Measuring class means on a device: the sums are torch's, however the data is divided, and travel in a frame."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_runtime.bundle import Array, Bundle, open_bundle, write_peft_folder
from edge_runtime.data import Dataset, evaluation_batches
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.model import BlockEngine
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.training.class_means import measure
from edge_runtime.training.job import Evaluated, Event, MeasuredPart, Stepped
from edge_runtime.training.round import run_round
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import (
    Layout,
    ModulePlan,
    Plan,
    UpdateRules,
    check_measurement,
    decode_update,
    measurement_layout,
)
from tests.edge.training.random_learning import random_dataset
from tests.edge.training.test_round import make_job, make_plan, run_child

CLASSES, FEATURES = 4, 32
LENGTHS = [3, 30, 5, 17, 8, 8, 40, 4, 11, 6, 23, 9]


@pytest.fixture
def bundle(bert_bundle: Path) -> Bundle:
    return open_bundle(bert_bundle)


@pytest.fixture
def adapter(bundle: Bundle) -> dict[str, Array]:
    """Every tensor random, so that an engine that forgot it would be found out."""
    rng = np.random.default_rng(3)
    return {
        name: rng.normal(scale=0.1, size=a.shape).astype(np.float32) for name, a in bundle.initial_adapter().items()
    }


def pooled(folder: Path, bundle: Bundle, adapter: dict[str, Array], dataset: Dataset, work: Path) -> Array:
    """What enters the classifier of transformers + peft, one example at a time, shape (examples, FEATURES)."""
    import torch
    import transformers
    from peft import PeftModel

    write_peft_folder(work, bundle.manifest, adapter)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    model = PeftModel.from_pretrained(base, work).eval().base_model.model.bert
    with torch.no_grad():
        made = [model(input_ids=torch.tensor(example.ids[None].astype(np.int64))) for example in dataset.examples]
    return np.concatenate([output.pooler_output.numpy() for output in made])


def of(layout: Layout, values: Array) -> tuple[Array, Array, Array]:
    sums, counts, moments = layout.split(values).values()
    return sums, counts, moments


@pytest.fixture
def measuring(bundle: Bundle, adapter: dict[str, Array]) -> BlockEngine:
    engine = BlockEngine(bundle)
    engine.use(AdapterParameters(adapter, Layout(())))
    return engine


@pytest.fixture
def answer(bundle: Bundle, adapter: dict[str, Array], bert_folder: Path, made: Any, tmp_path: Path) -> Path:
    """What torch makes of the examples; a fixture, so that it is there for runs without torch too."""
    dataset = random_dataset(bundle, LENGTHS)
    return made(
        "bert-pooled.npz",
        lambda path: write_array(path, pooled(bert_folder, bundle, adapter, dataset, tmp_path / "peft")),
    )


def test_sums_are_those_of_torch(bundle: Bundle, measuring: BlockEngine, answer: Path) -> None:
    """Sums, counts and second moments of what the plan's adapter makes of the examples."""
    dataset = random_dataset(bundle, LENGTHS)
    with np.load(answer) as stored:
        inputs = stored["inputs"].astype(np.float64)
    labels = np.array([int(example.labels[0]) for example in dataset.examples])
    found = measure(measuring, dataset, bundle.manifest.head)
    assert found.layout == measurement_layout(CLASSES, FEATURES)
    assert found.values.dtype == np.float32
    sums, counts, moments = of(found.layout, found.values)
    for label in range(CLASSES):
        np.testing.assert_allclose(sums[label], inputs[labels == label].sum(axis=0), atol=2e-5)
        assert counts[label] == np.sum(labels == label)
    np.testing.assert_allclose(moments, (inputs.T @ inputs)[np.triu_indices(FEATURES)], atol=1e-4)


def write_array(path: Path, inputs: Array) -> None:
    with path.open("wb") as file:
        np.savez(file, inputs=inputs)


def test_the_input_explains_every_head(bundle: Bundle, measuring: BlockEngine, adapter: dict[str, Array]) -> None:
    """Logits of any weight and bias are those of a linear layer on what was found; asking leaves the head in use."""
    rng = np.random.default_rng(4)
    dataset = random_dataset(bundle, [6, 9, 12])
    (batch,) = evaluation_batches(dataset, 8)
    for _ in range(2):
        head = {name: rng.normal(size=adapter[name].shape).astype(np.float32) for name in bundle.manifest.head_shapes}
        measuring.use(AdapterParameters({**adapter, **head}, Layout(())))
        before = measuring.logits(batch)
        inputs = measuring.features(batch)
        assert inputs.shape == (3, FEATURES)
        np.testing.assert_allclose(
            inputs @ head["classifier.weight"].T + head["classifier.bias"], before, rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(measuring.logits(batch), before)


def test_dividing_the_data_changes_nothing(bundle: Bundle, measuring: BlockEngine) -> None:
    """Smaller pieces of a batch, and two devices that hold half of the examples each."""
    dataset = random_dataset(bundle, LENGTHS)
    head = bundle.manifest.head
    whole = measure(measuring, dataset, head).values
    np.testing.assert_allclose(measure(measuring, dataset, head, micro_tokens=40).values, whole, atol=1e-4)
    halves = [
        measure(measuring, replace(dataset, examples=part), head).values
        for part in (dataset.examples[:5], dataset.examples[5:])
    ]
    np.testing.assert_allclose(halves[0] + halves[1], whole, atol=1e-4)
    assert np.abs(halves[0] - halves[1]).max() > 0.1


def test_a_language_model_has_nothing_to_measure(llama_bundle: Path) -> None:
    work = WorkingBundle(open_bundle(llama_bundle))
    with pytest.raises(EngineInputError, match="needs a bundle of blocks with a linear classifier"):
        measure(work.engine, random_dataset(work.bundle, [5]), work.bundle.manifest.head)


def measuring_plan(bundle: Bundle) -> Plan:
    rules = UpdateRules(fraction_bits=24, max_abs=2.0**24, weight_cap=1, max_devices=4)
    modules = tuple(ModulePlan(name, 4, "") for name in bundle.manifest.module_names)
    plan = make_plan(bundle, "")
    return msgspec.structs.replace(plan, state="measure", modules=modules, head_alive=False, update=rules)


def test_a_round_that_measures(bundle: Bundle, tmp_path: Path) -> None:
    """The frame holds the three blocks and weighs the examples; there are no steps and no losses of training."""
    job, signed = make_job(tmp_path, bundle, measuring_plan(bundle))
    events: list[Event] = []
    frame, done = run_round(job, events.append)
    layout = measurement_layout(CLASSES, FEATURES)
    update = decode_update(frame, signed_plan=signed, layout=layout)
    check_measurement(update, layout)
    assert update.weight == done.weight == 40
    assert of(layout, update.values)[1].tolist() == [10, 10, 10, 10]
    assert [(event.examples, event.of) for event in events if isinstance(event, MeasuredPart)] == [(32, 40), (40, 40)]
    assert not [event for event in events if isinstance(event, Stepped)]
    assert [event.examples for event in events if isinstance(event, Evaluated)] == [12]
    metrics = update.metrics
    assert (metrics.steps, metrics.loss_start, metrics.loss_end, metrics.eval_examples) == (0, None, None, 12)
    assert metrics.seconds is not None
    alone, _ = run_round(msgspec.structs.replace(job, evaluation=()), lambda event: None)
    assert alone[: 88 + 4 * layout.count] == frame[: 88 + 4 * layout.count]  # what follows is weight and metrics


def test_products_are_exact_whatever_the_plan_says_of_training(bundle: Bundle, tmp_path: Path) -> None:
    plan = measuring_plan(bundle)
    exact, _ = run_round(make_job(tmp_path, bundle, plan)[0], lambda event: None)
    int8 = msgspec.structs.replace(plan, training=msgspec.structs.replace(plan.training, products="int8"))
    fast, _ = run_round(make_job(tmp_path, bundle, int8)[0], lambda event: None)
    assert exact[88:-64] == fast[88:-64]


def test_the_child_measures_too(bundle: Bundle, tmp_path: Path) -> None:
    job, _ = make_job(tmp_path, bundle, measuring_plan(bundle), lines=8)
    code, events = run_child(job, tmp_path)
    assert code == 0
    assert MeasuredPart(8, 8) in events
