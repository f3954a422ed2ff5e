"""Cutting the variants of a step out of one joint forward and backward graph.

A variant is the part of the joint graph that its outputs need, with some tensors taken as given. What nobody asks for
(the gradient of a dead factor, the gradient of the lowest block's input) is not in the graph at all. Only standard
pruning happens here; ONNX Runtime fuses and plans the result when the session is made.

Any value may become an input or output of a variant, and those must state their element types: so a bundle's graphs
state that of every value, and nothing is inferred here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from edge_runtime.engine.errors import GraphError
from edge_runtime.engine.onnx_schema import (
    EXTERNAL,
    FLOAT,
    INT64,
    UNDEFINED,
    GraphProto,
    Message,
    ModelProto,
    TensorProto,
)

# Operators that only rearrange or describe what already exists. A backward pass repeats them instead of keeping their
# results, so that one activation is not kept twice in two shapes.
_VIEWS = frozenset({"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Flatten"})


@dataclass(frozen=True)
class InFile:
    """A float32 constant that lies in a file: where, and its shape."""

    file: str  # inside the folder that the session is told
    offset: int  # bytes
    shape: tuple[int, ...]

    def tensor(self, name: str) -> Message:
        """The ``TensorProto`` that says so."""
        tensor = TensorProto(name=name, data_type=FLOAT, dims=self.shape, data_location=EXTERNAL)
        length = 4 * math.prod(self.shape)
        for key, value in (("location", self.file), ("offset", self.offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class JointGraph:
    """A joint graph with its nodes indexed by what they make."""

    def __init__(self, data: bytes, *, name: str) -> None:
        """Index a serialised ONNX model.

        Args:
            data: The model.
            name: Used in messages.

        Raises:
            GraphError: no ONNX model, one without nodes, or one with a value of unstated element type.
        """
        try:
            model = ModelProto.FromString(data)
        except (DecodeError, UnicodeDecodeError) as error:  # the latter: protobuf without its compiled part
            raise GraphError(f"{name}: not an ONNX model: {error}") from error
        if not model.graph.node:
            raise GraphError(f"{name}: holds no nodes")
        self.name = name
        self.model: Message = model
        self._nodes: list[Message] = list(model.graph.node)
        self._producer = {output: index for index, node in enumerate(self._nodes) for output in node.output if output}
        self.inputs = {value.name: value for value in model.graph.input}
        self.outputs = {value.name: value for value in model.graph.output}
        self._values = {value.name: value for value in model.graph.value_info}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        untyped = [output for output in self._producer if self._element_type(output) == UNDEFINED]
        if untyped:
            raise GraphError(
                f"{name}: no element type for tensor {untyped[0]!r} and {len(untyped) - 1} others: "
                "made by an older exporter: export the bundle again"
            )

    @classmethod
    def load(cls, path: Path) -> JointGraph:
        """Read a graph file of a bundle.

        Raises:
            GraphError: it cannot be read, or see :meth:`__init__`.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise GraphError(f"{path.name}: cannot be read: {error}") from error
        return cls(data, name=path.name)

    def node_count(self, outputs: Iterable[str], given: Collection[str] = ()) -> int:
        """How many nodes are needed for ``outputs``."""
        return len(self._needed(outputs, given))

    def derive(
        self, outputs: Sequence[str], given: Collection[str] = (), constants: Mapping[str, InFile] | None = None
    ) -> Message:
        """The part of the graph that makes ``outputs``, with the ``given`` tensors as additional inputs.

        Args:
            outputs: Names.
            given: Inner tensors that are fed instead of made.
            constants: Inputs that become constants.

        Raises:
            GraphError: an output is not made by the graph.
        """
        needed = sorted(self._needed(outputs, given))
        nodes = [self._nodes[index] for index in needed]
        read = {name for node in nodes for name in node.input} | set(outputs)
        graph = GraphProto(name=self.model.graph.name)
        graph.node.extend(nodes)
        graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in read)
        constants = constants or {}
        graph.initializer.extend(where.tensor(name) for name, where in constants.items() if name in read)
        fed = [name for name in self.inputs if name in read and name not in given and name not in constants]
        graph.input.extend(self.inputs[name] for name in fed)
        graph.input.extend(self._value(name) for name in given if name in read)
        graph.output.extend(self._value(name) for name in outputs)
        model = ModelProto(ir_version=self.model.ir_version, producer_name="emberlora", graph=graph)
        model.opset_import.extend(self.model.opset_import)
        return model

    def boundary(self, forward: Sequence[str], backward: Sequence[str]) -> tuple[str, ...]:
        """The activations to keep: tensors the forward pass makes and the backward pass reads.

        Args:
            forward: Outputs of the forward pass.
            backward: Outputs of the backward pass.

        Returns:
            Names in graph order, views and shape computations replaced by what they are made from.
        """
        forward_nodes = self._needed(forward, ())
        in_forward = {output for index in forward_nodes for output in self._nodes[index].output}
        kept: set[str] = set()
        visited: set[str] = set()
        pending = list(backward)
        while pending:
            name = pending.pop()
            if name in visited or name not in self._producer:
                continue
            visited.add(name)
            node = self._nodes[self._producer[name]]
            if name in in_forward and not self._is_cheap(node):
                kept.add(name)
            else:
                pending.extend(node.input)
        return tuple(sorted(kept, key=lambda name: (self._producer[name], name)))

    def _is_cheap(self, node: Message) -> bool:
        if node.op_type in _VIEWS or node.op_type in {"Shape", "Constant", "ConstantOfShape"}:
            return True
        # Shape arithmetic: everything it makes is a small integer tensor.
        types = {self._element_type(name) for name in node.output}
        return types == {INT64} and node.op_type != "ArgMax"

    def _element_type(self, name: str) -> int:
        value = self._values.get(name) or self.outputs.get(name)
        return int(value.type.tensor_type.elem_type) if value is not None else UNDEFINED

    def _value(self, name: str) -> Message:
        value = self.outputs.get(name) or self.inputs.get(name) or self._values.get(name)
        if value is None:
            raise GraphError(f"{self.name}: makes no tensor {name!r}")
        return value

    def _needed(self, outputs: Iterable[str], given: Collection[str]) -> set[int]:
        needed: set[int] = set()
        pending = [name for name in outputs if name not in given]
        for name in pending:
            if name not in self._producer:
                raise GraphError(f"{self.name}: makes no tensor {name!r}")
        while pending:
            index = self._producer.get(pending.pop())
            if index is None or index in needed:
                continue
            needed.add(index)
            pending.extend(name for name in self._nodes[index].input if name and name not in given)
        return needed
