"""The commands on a bundle for onnxruntime-training: the same results as with the block engine, and clear refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_runtime.bundle import (
    CHECKPOINT,
    EVALUATION_MODEL,
    Array,
    Bundle,
    cut_ranks,
    encode_tensors,
    map_tensors,
    open_bundle,
)
from edge_runtime.training.job import FRAME_NAME, Failed, TrainingJob, decode_event
from edge_runtime.wire import ModulePlan, Tier, decode_update, tier_layouts
from tests.edge.encrypted import VAULT
from tests.edge.held import run_held
from tests.edge.training.test_round import make_job, make_plan, write_data

TEXTS = [" ".join(f"word{(start + step) % 20}" for step in range(12)) for start in range(12)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Labelled texts."""
    return write_data(tmp_path / "data.jsonl", 24)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Texts for a language model."""
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return path


def edge(python: Path | str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "edge_runtime.cli", "edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def result(python: Path | str, *arguments: object) -> Any:
    done = edge(python, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def same(found: Path, expected: Path) -> None:
    ours, theirs = (map_tensors(folder / "adapter_model.safetensors") for folder in (found, expected))
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_train_learns_what_the_block_engine_learns(
    model: str, ort_python: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The same losses and, up to rounding, the same adapter after several steps with clipping and decay."""
    file = request.getfixturevalue("data" if model == "bert" else "texts")
    options = ("--data", file, "--eval", file, "--steps", 12, "--batch-size", 4, "--clip-norm", 0.5)
    options += ("--weight-decay", 0.1, "--lr-a", 1e-2, "--lr-b", 1e-2, "--lr-head", 1e-2)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    bundles = [request.getfixturevalue(name) for name in (f"ort_{model}", f"{model}_bundle")]
    found = result(ort_python, "train", "--bundle", bundles[0], "--out", ours, *options)
    expected = result(sys.executable, "train", "--bundle", bundles[1], "--out", theirs, *options)
    for key in ("loss_start", "loss_end"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)
    assert found["eval"]["loss"] < found["before"]["loss"]
    for key in ("before", "eval"):
        assert found[key]["loss"] == pytest.approx(expected[key]["loss"], rel=1e-4)
        assert found[key]["correct"] == expected[key]["correct"]
    same(ours, theirs)


def test_eval_and_predict_agree(ort_python: Path, ort_bert: Path, bert_bundle: Path, data: Path) -> None:
    measured = [
        result(python, "eval", "--bundle", bundle, "--data", data)
        for python, bundle in ((ort_python, ort_bert), (sys.executable, bert_bundle))
    ]
    assert measured[0]["correct"] == measured[1]["correct"]
    assert measured[0]["loss"] == pytest.approx(measured[1]["loss"], rel=1e-5)
    told = [
        edge(python, "predict", "--bundle", bundle, "--text", TEXTS[0]).stdout
        for python, bundle in ((ort_python, ort_bert), (sys.executable, bert_bundle))
    ]
    assert told[0] == told[1] != ""


def run_round(python: Path | str, folder: Path, bundle: Bundle, tier: int) -> dict[str, Array]:
    """A round's change by tensor: ranks from 2 to 4, some modules with one factor alive, some with none.

    Tier 1 carries the first two components of the modules from the second block on.
    """
    folder.mkdir()
    manifest = bundle.manifest
    modules = tuple(
        ModulePlan(name, 2 + index % 3, ("B", "", "AB", "A")[index % 4])  # type: ignore[arg-type]  # the literals
        for index, name in enumerate(manifest.module_names)
    )
    plan = msgspec.structs.replace(make_plan(bundle, "B"), modules=modules, tiers=(Tier(1, max_rank=2),))
    job, signed = make_job(folder, bundle, plan)
    job = msgspec.structs.replace(job, tier=tier)
    rng = np.random.default_rng(2)
    start = {name: rng.normal(scale=0.1, size=array.shape) for name, array in bundle.initial_adapter().items()}
    adapter = cut_ranks(manifest, {name: array.astype(np.float32) for name, array in start.items()}, plan.ranks)
    Path(job.adapter).write_bytes(encode_tensors(adapter))
    done = child(python, job)
    assert (done.returncode, done.stderr) == (0, b"")
    layouts = tier_layouts(plan, features=manifest.features, places=manifest.places, head=manifest.head_shapes)
    layout = layouts[tier]
    update = decode_update(VAULT.read(folder / FRAME_NAME, "frame"), signed_plan=signed, layout=layout)
    return {name: np.asarray(array) for name, array in layout.split(update.values).items()}


def child(python: Path | str, job: TrainingJob) -> subprocess.CompletedProcess[bytes]:
    command = [str(python), "-W", "error", "-m", "edge_runtime.training.child"]
    return run_held(command, msgspec.json.encode(job))


@pytest.mark.parametrize("tier", [0, 1])
def test_a_round_sends_what_the_block_engine_would_send(
    tier: int, ort_python: Path, ort_bert: Path, bert_bundle: Path, tmp_path: Path
) -> None:
    """The training child obeys a plan with kills, other ranks and tiers; its update is the same up to rounding."""
    bundle = open_bundle(bert_bundle)
    found = run_round(ort_python, tmp_path / "ours", open_bundle(ort_bert), tier)
    expected = run_round(sys.executable, tmp_path / "theirs", bundle, tier)
    assert set(found) == set(expected)
    blocks = {bundle.manifest.places[name.rpartition(".")[0]] for name in found if ".lora_" in name}
    assert blocks == ({0, 1, 2} if tier == 0 else {1, 2})
    for name, array in expected.items():
        assert np.abs(array).max() > 0, name
        np.testing.assert_allclose(found[name], array, atol=2e-4, err_msg=name)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    return line


def test_a_device_with_stock_onnxruntime_refuses_in_one_line(
    ort_bert: Path, data: Path, tmp_path: Path, bert_bundle: Path
) -> None:
    out = tmp_path / "adapter"
    line = refused(edge(sys.executable, "train", "--bundle", ort_bert, "--data", data, "--out", out))
    assert "needs onnxruntime-training-cpu 1.19.2 in place of onnxruntime" in line
    assert not out.exists()
    job, _ = make_job(tmp_path, open_bundle(ort_bert), make_plan(open_bundle(ort_bert), "B"))
    done = child(sys.executable, job)
    assert done.returncode == 2  # so that `edge run` stops with the line instead of trying for ever
    failed = decode_event(done.stdout.splitlines()[-1])
    assert isinstance(failed, Failed)
    assert failed.input
    assert "needs onnxruntime-training-cpu" in failed.message


def test_onnxruntime_training_refuses_a_bundle_of_blocks_in_one_line(
    ort_python: Path, bert_bundle: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    line = refused(edge(ort_python, "train", "--bundle", bert_bundle, "--data", data, "--out", out))
    assert "expected 1.23.2 or newer, got 1.19.2" in line
    assert not out.exists()


@pytest.mark.parametrize("file", [CHECKPOINT, EVALUATION_MODEL])
def test_a_damaged_file_is_one_line(file: str, ort_python: Path, ort_bert: Path, tmp_path: Path) -> None:
    """Files are verified once, when they arrive; damage after that is found by the package."""
    bundle, cases = tmp_path / "bundle", tmp_path / "cases"
    shutil.copytree(ort_bert, bundle)
    cases.mkdir()
    (bundle / file).write_bytes(b"\0" * 1000)
    command = [ort_python, "-m", "edge_runtime.engine.ort_training", "gradients", bundle, cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "bundle: onnxruntime-training cannot load it" in line
