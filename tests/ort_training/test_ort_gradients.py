"""Artifacts of onnxruntime-training against the block engine on the same model, and against the package's own tools."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.bundle import Array, Bundle, open_bundle
from edge_runtime.engine.model import BlockEngine
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.engine.runtime import start_runtime
from edge_runtime.wire import Layout
from tests.edge.engine.test_parity import make_batch, random_adapter

TOLERANCE = 1e-4
INSIDE = Path(__file__).with_name("inside.py")
MODULE = "edge_runtime.engine.ort_training"


def full_ranks(bundle: Bundle, rng: np.random.Generator) -> dict[str, Array]:
    return {k: rng.normal(scale=0.1, size=v.shape).astype(np.float32) for k, v in bundle.initial_adapter().items()}


def last_block(bundle: Bundle, name: str) -> bool:
    return name.startswith(bundle.manifest.blocks[-1].prefix)


# Name of the case -> its adapter, and which tensors are alive.
Adapter = Callable[[Bundle, np.random.Generator], dict[str, Array]]
Alive = Callable[[Bundle, int, str], bool]
CASES: dict[str, tuple[Adapter, Alive]] = {
    "as exported": (full_ranks, lambda bundle, index, name: True),
    "mixed ranks": (random_adapter, lambda bundle, index, name: True),
    "only B": (random_adapter, lambda bundle, index, name: name.endswith("lora_b")),
    "last block": (full_ranks, lambda bundle, index, name: last_block(bundle, name)),
    "scattered": (random_adapter, lambda bundle, index, name: "lora" in name and index % 3 == 1),
}
HEAD = "head alone"
CASES[HEAD] = (full_ranks, lambda bundle, index, name: name.startswith("classifier"))


class Answers:
    """Results of one model's cases from the child, and what the block engine says."""

    def __init__(self, blocks: Bundle, folder: Path) -> None:
        start_runtime()
        self.blocks, self.folder = blocks, folder
        self.engine = BlockEngine(blocks)

    def cases(self) -> list[str]:
        return [name for name in CASES if self.blocks.manifest.head.params or name != HEAD]

    def case(self, name: str) -> tuple[dict[str, Array], list[str], Any]:
        """Adapter, alive names, batch."""
        rng = np.random.default_rng(5)
        make, chosen = CASES[name]
        adapter = make(self.blocks, rng)
        alive = [tensor for index, tensor in enumerate(adapter) if chosen(self.blocks, index, tensor)]
        return adapter, alive, make_batch(self.blocks, rng)

    def write(self) -> None:
        for name in self.cases():
            adapter, alive, batch = self.case(name)
            arrays: dict[str, Any] = {f"adapter:{key}": array for key, array in adapter.items()}
            arrays |= {key: getattr(batch, key) for key in ("input_ids", "attention_mask", "rows", "labels")}
            np.savez(self.folder / f"{name}.case.npz", alive=np.array(alive), **arrays)

    def expected(self, name: str) -> dict[str, Array]:
        adapter, alive, batch = self.case(name)
        self.engine.use(AdapterParameters(adapter, Layout(tuple((key, adapter[key].shape) for key in alive))))
        made = self.engine.gradients(batch)
        gradients = {f"grad:{key}": array for key, array in made.tensors.items()}
        return {**gradients, "loss": np.asarray(made.score.loss), "logits": self.engine.logits(batch)}

    def found(self, name: str) -> Mapping[str, Array]:
        with np.load(self.folder / f"{name}.result.npz") as file:
            return {key: file[key] for key in file.files}


@pytest.fixture(scope="module", params=["bert", "llama"])
def answers(request: pytest.FixtureRequest, ort_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Both kinds of model."""
    made = Answers(open_bundle(request.getfixturevalue(f"{request.param}_bundle")), tmp_path_factory.mktemp("cases"))
    made.write()
    bundle = request.getfixturevalue(f"ort_{request.param}")
    command = [ort_python, "-W", "error", "-m", MODULE, "gradients", bundle, made.folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return made


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_block_engines(answers: Answers, name: str) -> None:
    """Loss, logits and the gradient of every alive tensor, and of no other, whatever is alive and at which ranks."""
    if name not in answers.cases():
        pytest.skip("this model trains nothing of its head")
    found, expected = answers.found(name), answers.expected(name)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].shape == value.shape
        error = np.linalg.norm(found[key] - value) / np.linalg.norm(value)
        assert error < TOLERANCE, f"{key}: {error:.1e}"


def ask(python: Path, question: str, bundle: Path) -> Any:
    done = subprocess.run([python, INSIDE, question, bundle], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_files_are_what_the_packages_own_generator_makes(
    model: str, ort_python: Path, request: pytest.FixtureRequest
) -> None:
    """The same nodes, inputs, optimizer and parameters; only symbolic ranks cost a few nodes that compute shapes."""
    found = ask(ort_python, "official", request.getfixturevalue(f"ort_{model}"))
    assert not found["torch"]
    more = found["more_nodes"]
    assert set(more.pop("training_model.onnx")) <= {"Shape", "ConcatTraining"}
    assert more == {"eval_model.onnx": {}, "optimizer_model.onnx": {}}
    assert not any(found["fewer_nodes"].values())
    assert not any(found["inputs"].values())
    ours, theirs = found["optimizer"]
    assert ours == theirs
    assert found["checkpoint"] == []
    assert found["ir_versions"] == [9]


def test_the_packages_own_optimizer_learns_with_the_four_files(ort_python: Path, ort_bert: Path) -> None:
    """Any application of onnxruntime-training can train with them, and evaluation sees what was learned."""
    found = ask(ort_python, "fit", ort_bert)
    assert found["losses"][-1] < 0.8 * found["losses"][0]
    assert found["eval"] <= found["losses"][-1]
    assert found["logits"] == [4, 4]


def test_a_kill_takes_its_part_out_of_the_graph(ort_python: Path, ort_llama: Path) -> None:
    """With only the last of three blocks alive, the backward part is less than half of the whole one."""
    found = ask(ort_python, "sizes", ort_llama)
    assert found["top"] - found["forward"] < (found["all"] - found["forward"]) / 2
