"""What tests ask of the environment with onnxruntime-training: ``python inside.py QUESTION BUNDLE``, JSON on stdout.

The package's own code is the oracle here: its artifact generator, and its ``Module`` and ``Optimizer`` on the bundle's
four files. ``import onnxruntime.training`` would import torch only for parts that nobody needs here, so its folder is
given to Python as a bare package.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.capi import _pybind_state as bindings

bare = types.ModuleType("onnxruntime.training")
bare.__path__ = [str(Path(onnxruntime.__file__).parent / "training")]
sys.modules["onnxruntime.training"] = bare

FILES = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx")


def official(folder: Path) -> dict[str, Any]:
    """The package's generator on the same forward graph: what is in one result and not in the other."""
    from onnxruntime.training import artifacts

    state = bindings.load_checkpoint(str(folder / "checkpoint"))
    parameters = {name: state.get_parameter(name) for name in state.parameter_names()}
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    model = onnx.load(folder / "eval_model.onnx")
    users = [value for value in model.graph.input if value.name not in parameters]
    for value in model.graph.input:
        if value.name in parameters:
            array = parameters[value.name].data.numpy()
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    del model.graph.input[:]
    model.graph.input.extend(users)
    with tempfile.TemporaryDirectory() as out:
        artifacts.generate_artifacts(
            model,
            requires_grad=trained,
            frozen_params=[name for name in parameters if name not in trained],
            optimizer=artifacts.OptimType.AdamW,
            artifact_directory=out,
        )
        models = {name: (onnx.load(folder / name), onnx.load(Path(out) / name)) for name in FILES}
        theirs = bindings.load_checkpoint(str(Path(out) / "checkpoint"))
    return {
        "more_nodes": {name: dict(_nodes(ours) - _nodes(other)) for name, (ours, other) in models.items()},
        "fewer_nodes": {name: dict(_nodes(other) - _nodes(ours)) for name, (ours, other) in models.items()},
        "inputs": {name: sorted(_names(ours) ^ _names(other)) for name, (ours, other) in models.items()},
        "optimizer": [_attributes(model) for model in models["optimizer_model.onnx"]],
        "checkpoint": sorted(set(parameters) ^ set(theirs.parameter_names())),
        "ir_versions": sorted({ours.ir_version for ours, _ in models.values()}),
        "torch": "torch" in sys.modules,
    }


def _nodes(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def _names(model: Any) -> set[str]:
    return {value.name for value in model.graph.input}


def _attributes(model: Any) -> dict[str, Any]:
    return {item.name: onnx.helper.get_attribute_value(item) for item in model.graph.node[0].attribute}


def fit(folder: Path) -> dict[str, Any]:
    """Train with the package's own module and optimizer, as any application of theirs would; the losses."""
    state = bindings.load_checkpoint(str(folder / "checkpoint"))
    cpu = bindings.OrtDevice(bindings.OrtDevice.cpu(), bindings.OrtDevice.default_memory(), 0)
    options = onnxruntime.SessionOptions()
    module = bindings.Module(str(folder / FILES[0]), state, str(folder / FILES[1]), cpu, options)
    optimizer = bindings.Optimizer(str(folder / FILES[2]), state, cpu, options)
    optimizer.set_learning_rate(1e-2)
    ids = np.random.default_rng(0).integers(4, 40, size=(4, 8))
    batch = [ids, np.ones_like(ids), np.arange(4) * 8, np.array([0, 1, 2, 3])]
    losses = []
    for _ in range(12):
        outputs = bindings.OrtValueVector()
        module.train_step(batch, outputs)
        losses.append(float(outputs[0].numpy()))
        optimizer.optimizer_step()
        module.lazy_reset_grad()
    outputs = bindings.OrtValueVector()
    module.eval_step(batch, outputs)
    return {"losses": losses, "eval": float(outputs[0].numpy()), "logits": list(outputs[2].numpy().shape)}


def sizes(folder: Path) -> dict[str, int]:
    """Nodes of the training model for all factors, and for those of the last block alone."""
    from edge_runtime.bundle import open_bundle
    from edge_runtime.engine.ort_training.artifacts import training_model

    bundle = open_bundle(folder.parent)
    top = len(bundle.manifest.blocks) - 1
    names = [f"{module.name}.lora_a" for module in bundle.manifest.modules if module.block == top]
    model = onnx.load(folder / "eval_model.onnx")
    return {
        "forward": len(model.graph.node),
        "all": len(onnx.load(folder / "training_model.onnx").graph.node),
        "top": len(training_model(model, names).graph.node),
    }


if __name__ == "__main__":
    question, bundle = sys.argv[1:]
    answer = {"official": official, "fit": fit, "sizes": sizes}[question](Path(bundle) / "training")
    print(json.dumps(answer))  # noqa: T201 - the answer
