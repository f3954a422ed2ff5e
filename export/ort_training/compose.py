"""From the parts' forward graphs to one evaluation model: embedding, blocks, chosen rows, head, loss.

Every parameter becomes an input by its own name, so the graph holds no weights; it is small, and its making grows with
depth only by copying nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.bundle import Array, Manifest
from export.lora import LORA_A, LORA_B, SCALE
from export.tracing import HIDDEN, OPSET, OUT

IR_VERSION = 9  # onnxruntime-training 1.19.2 reads at most 10
_ONE = "one"
_TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}


class Composer:
    """Collects the nodes of one graph."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self._constants = [numpy_helper.from_array(np.ones((), np.float32), _ONE)]

    def constant(self, name: str, value: Array) -> None:
        """Add a small constant."""
        self._constants.append(numpy_helper.from_array(value, name))

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        """Add a node of the default domain."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))

    def part(self, graph: Any, prefix: str, names: Mapping[str, str]) -> None:
        """Add a copy of ``graph``; a value is called what ``names`` says, or else ``prefix`` and its own name."""

        def renamed(name: str) -> str:
            return names.get(name, prefix + name) if name else name

        for tensor in graph.initializer:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            copy.name = renamed(tensor.name)
            self._constants.append(copy)
        for node in graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = prefix + node.name
            copy.input[:] = [renamed(name) for name in node.input]
            copy.output[:] = [renamed(name) for name in node.output]
            _differentiable(copy)
            self.nodes.append(copy)

    def model(self, inputs: list[Any], outputs: list[Any]) -> Any:
        """The finished model, checked; it states the shape of every inner value that can be known."""
        read = {name for node in self.nodes for name in node.input}
        constants = [tensor for tensor in self._constants if tensor.name in read]
        graph = helper.make_graph(self.nodes, "evaluation", inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name = "emberlora"
        onnx.checker.check_model(model)
        return onnx.shape_inference.infer_shapes(model)


def _differentiable(node: Any) -> None:
    """Change what onnxruntime-training has no gradient for into what it has one for."""
    if node.op_type == "Reciprocal":
        node.op_type = "Div"
        node.input.insert(0, _ONE)
    if node.op_type == "LayerNormalization":  # its gradient reads the optional outputs
        node.output.extend(f"{node.output[0]}/{name}" for name in ("mean", "inv_std")[len(node.output) - 1 :])


def evaluation_model(manifest: Manifest, graphs: Mapping[str, Any], weights: Mapping[str, Array]) -> Any:
    """Put the parts together.

    Args:
        manifest: Names the parts: ``graphs`` has a model for "embed", for each kind's name, and for "head".
        graphs: Forward graphs with the inputs that :class:`~edge_runtime.bundle.BlockKind`, ``Embed`` and ``Head``
            state; the head from ``rows`` to ``logits``.
        weights: The frozen parameters by name, for their shapes and types.

    Returns:
        An ``onnx.ModelProto`` as :data:`edge_runtime.bundle.TRAINING_FILES` states it; the ranks are symbolic.
    """
    made = Composer()
    made.constant(SCALE, np.asarray(manifest.scale, np.float32))
    embed = {name: name for name in ("input_ids", "attention_mask")}
    made.part(graphs["embed"].graph, "embed/", embed | {f"w:{name}": name for name in manifest.embed.weights})
    hidden = _blocks(made, manifest, graphs)
    made.constant("flat", np.asarray([-1, manifest.width], np.int64))
    made.node("Reshape", [hidden, "flat"], "every_row")
    made.node("Gather", ["every_row", "rows"], "head/rows", axis=0)
    head = {"logits": "logits"} | {f"w:{name}": name for name in manifest.head.weights}
    head |= {f"p:{param.name}": f"{manifest.head.module}.{param.name}" for param in manifest.head.params}
    made.part(graphs["head"].graph, "head/", head)
    made.node("SoftmaxCrossEntropyLoss", ["logits", "labels"], "loss", reduction="mean")
    made.node("ArgMax", ["logits"], "best", axis=1, keepdims=0)
    made.node("Equal", ["best", "labels"], "hit")
    made.node("Cast", ["hit"], "hit_number", to=TensorProto.INT64)
    made.node("ReduceSum", ["hit_number"], "correct", keepdims=0)
    return made.model(_inputs(manifest, weights), _outputs(manifest))


def _blocks(made: Composer, manifest: Manifest, graphs: Mapping[str, Any]) -> str:
    """Add every block; returns the name of the last hidden state."""
    hidden = f"embed/{HIDDEN}"
    for index, block in enumerate(manifest.blocks):
        kind = manifest.kind_of(index)
        names = {HIDDEN: hidden, **{name: f"embed/{name}" for name in kind.shared}}
        names |= {f"w:{name}": f"{block.prefix}.{name}" for name in kind.weights}
        for slot in kind.slots:
            names[f"{SCALE}:{slot.name}"] = SCALE
            for factor in (LORA_A, LORA_B):
                names[f"{factor}:{slot.name}"] = f"{block.prefix}.{slot.name}.{factor}"
        made.part(graphs[kind.name].graph, f"{block.prefix}/", names)
        hidden = f"{block.prefix}/{OUT}"
    return hidden


def _inputs(manifest: Manifest, weights: Mapping[str, Array]) -> list[Any]:
    def value(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    values = [value(name, ["batch", "seq"], TensorProto.INT64) for name in ("input_ids", "attention_mask")]
    values += [value(name, ["rows"], TensorProto.INT64) for name in ("rows", "labels")]
    for number, module in enumerate(manifest.modules):
        rank = f"rank{number}"
        values.append(value(f"{module.name}.{LORA_A}", [rank, module.in_features]))
        values.append(value(f"{module.name}.{LORA_B}", [module.out_features, rank]))
    values += [value(name, list(shape)) for name, shape in manifest.head_shapes.items()]
    return values + [value(name, list(array.shape), _TYPES[array.dtype]) for name, array in weights.items()]


def _outputs(manifest: Manifest) -> list[Any]:
    classes = len(manifest.labels) or manifest.text.vocab_size
    return [
        helper.make_tensor_value_info("loss", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("correct", TensorProto.INT64, []),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", classes]),
    ]
