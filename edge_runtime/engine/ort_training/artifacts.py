"""From an evaluation model to training artifacts, with the bindings of onnxruntime-training alone.

An evaluation model holds the forward pass and the loss, with *every* parameter as a graph input: it has no weights in
it, so making a gradient graph for another alive set moves no weights and needs neither torch nor the package's own
``generate_artifacts``, which does the same on a model with its weights inside. Tests compare the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.bundle import CHECKPOINT, EVALUATION_MODEL, OPTIMIZER_MODEL, TRAINING_MODEL, Array
from edge_runtime.engine.errors import GraphError
from edge_runtime.engine.ort_training.bindings import graph_errors, load_bindings, session_options

if TYPE_CHECKING:  # onnx comes with onnxruntime-training; a device without it can still import this module
    import onnx

LOSS, CORRECT, LOGITS = "loss", "correct", "logits"
IR_VERSION = 9  # the newest that 1.19.2 was tested with; it reads at most 10
_CONTRIB = "com.microsoft"


def write_artifacts(
    folder: Path, model: onnx.ModelProto, trained: Mapping[str, Array], frozen: Mapping[str, Array]
) -> None:
    """Write the four files with everything in ``trained`` alive.

    Args:
        folder: The bundle's folder.
        model: The evaluation model.
        trained: The adapter's tensors by name, float32; the shapes the artifacts are for.
        frozen: The model's other parameters by name.

    Raises:
        EngineMissingError: no onnxruntime-training here.
        GraphError: no gradient graph can be made.
    """
    (folder / TRAINING_MODEL).parent.mkdir(exist_ok=True)
    (folder / EVALUATION_MODEL).write_bytes(model.SerializeToString(deterministic=True))
    training = training_model(model, tuple(trained))
    (folder / TRAINING_MODEL).write_bytes(training.SerializeToString(deterministic=True))
    (folder / OPTIMIZER_MODEL).write_bytes(optimizer_model().SerializeToString(deterministic=True))
    write_checkpoint(folder / CHECKPOINT, trained, frozen)


def training_model(evaluation: onnx.ModelProto, alive: Sequence[str]) -> onnx.ModelProto:
    """The gradient graph of the loss for the ``alive`` parameters, as onnxruntime-training's ``Module`` takes it.

    Gradients go into buffers that are inputs, ``{name}_grad.accumulation.buffer``; ``lazy_reset_grad`` says to
    overwrite instead of add. What no alive parameter needs is not in the graph.

    Raises:
        EngineMissingError: no onnxruntime-training here.
        GraphError: no gradient graph can be made.
    """
    import onnx

    forward = onnx.ModelProto()
    forward.CopyFrom(evaluation)
    kept = [value for value in forward.graph.output if value.name in (LOSS, CORRECT)]
    del forward.graph.output[:]
    forward.graph.output.extend(kept)
    bindings, options = load_bindings(), session_options()
    with graph_errors(f"{EVALUATION_MODEL}: no gradient graph"):
        # Both passes are the package's own: fusions that keep the graph differentiable, then the gradients.
        optimised = bindings.get_optimized_model(forward.SerializeToString(), set(alive), options)
        builder = bindings.GradientGraphBuilder(optimised, {LOSS}, set(alive), LOSS, options)
        builder.build()
    model = onnx.load_model_from_string(builder.get_model())
    _accumulate(model.graph, [value.name for value in kept], alive)
    model.ir_version = IR_VERSION
    return model


def _accumulate(graph: onnx.GraphProto, outputs: Sequence[str], alive: Sequence[str]) -> None:
    """Replace the gradient outputs by nodes that add them to buffers, in the order of the parameters."""
    from onnx import TensorProto, helper

    made = {value.name: value for value in graph.output}
    absent = [name for name in alive if f"{name}_grad" not in made]
    if absent:
        raise GraphError(f"{EVALUATION_MODEL}: the loss does not depend on {absent[0]} ({len(absent)} such parameters)")
    del graph.output[:]
    graph.output.extend(made[name] for name in outputs)
    for number, name in enumerate(alive):
        buffer = type(made[f"{name}_grad"])()
        buffer.CopyFrom(made[f"{name}_grad"])
        buffer.name = f"{name}_grad.accumulation.buffer"
        done = f"{name}_grad.accumulation.out"
        graph.input.append(buffer)
        graph.output.append(helper.make_tensor_value_info(done, TensorProto.BOOL, [1]))
        graph.node.append(
            helper.make_node(
                "InPlaceAccumulatorV2",
                [buffer.name, f"{name}_grad", "lazy_reset_grad"],
                [done],
                name=f"GradientAccumulator{number}",
                domain=_CONTRIB,
            )
        )
    graph.input.append(helper.make_tensor_value_info("lazy_reset_grad", TensorProto.BOOL, [1]))


def optimizer_model() -> onnx.ModelProto:
    """AdamW over sequences of tensors, as the package's ``Optimizer`` takes it; our own loop does not use it."""
    from onnx import TensorProto, helper

    sequences = ("params", "gradients", "first_order_moments", "second_order_moments")
    inputs = [
        helper.make_tensor_value_info("learning_rate", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("step", TensorProto.INT64, [1]),
        *(helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None) for name in sequences),
    ]
    output = helper.make_tensor_value_info("updated_flag", TensorProto.BOOL, [1])
    node = helper.make_node(
        "AdamWOptimizer",
        [value.name for value in inputs],
        [output.name],
        name="AdamWOptimizer",
        domain=_CONTRIB,
        alpha=0.9,
        beta=0.999,
        epsilon=1e-6,
        weight_decay=0.0,
        correct_bias=1,
        adam_mode=1,
    )
    graph = helper.make_graph([node], "AdamW", inputs, [output])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def write_checkpoint(path: Path, trained: Mapping[str, Array], frozen: Mapping[str, Array]) -> None:
    """Write a checkpoint; ``trained`` are its trainable parameters.

    Raises:
        EngineMissingError: no onnxruntime-training here.
        GraphError: it cannot be written.
    """
    with graph_errors(f"{path.name}: cannot be written"):
        load_bindings().save_checkpoint(_protos(trained), _protos(frozen), str(path), False)


def _protos(tensors: Mapping[str, Array]) -> list[Any]:
    from onnx import numpy_helper

    return [numpy_helper.from_array(np.ascontiguousarray(a), name).SerializeToString() for name, a in tensors.items()]
