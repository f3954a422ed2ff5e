"""Writes an ONNX graph operator by operator, with the element type of every value.

Types are written because a device cuts this graph into parts, what was an inner value becomes an input or output, and
neither the device nor ``onnx.shape_inference`` can tell the type of what an operator of ``com.microsoft`` makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from export.clean import CONTRIB, IR_VERSION, check, prune, state_values
from export.tracing import HIDDEN, OPSET, Input

_CONTRIB_OPERATORS = frozenset({"FusedMatMul", "QuickGelu", "RotaryEmbedding"})


class GraphBuilder:
    """A graph under construction; a value is its name, and everything is float32 except sizes, which are int64."""

    def __init__(self, inputs: Sequence[Input] = ()) -> None:
        """Args: graph inputs, to know the types of those that are not float32."""
        self._nodes: list[Any] = []
        self._constants: dict[tuple[Any, ...], Any] = {}
        self._types = {item.name: _element_type(item) for item in inputs}
        self._results: dict[str, str] = {}
        self._shapes: dict[tuple[int, ...], str] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append an operator with one output, and return its name."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, count: int, *inputs: str, **attributes: Any) -> tuple[str, ...]:
        """Append an operator; returns its ``count`` outputs.

        They have the first input's type (``Where``: the second's); "" stands for an unused one.
        """
        number = len(self._nodes)
        outputs = tuple(f"v{number}" if place == 0 else f"v{number}_{place}" for place in range(count))
        domain = CONTRIB if kind in _CONTRIB_OPERATORS else ""
        self._nodes.append(helper.make_node(kind, inputs, outputs, f"{kind}_{number}", domain=domain, **attributes))
        like = inputs[1 if kind == "Where" else 0]
        kept = TensorProto.INT64 if kind == "Shape" else self._types.get(like, TensorProto.FLOAT)
        self._types.update(dict.fromkeys(outputs, kept))
        return outputs

    def number(self, value: float) -> str:
        """A float32 scalar; equal ones are one constant."""
        return self._constant(np.asarray(value, np.float32))

    def sizes(self, *values: int) -> str:
        """An int64 vector, for shapes and axes."""
        return self._constant(np.asarray(values, np.int64))

    def _constant(self, array: Any) -> str:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, f"c{len(self._constants)}")
        name = str(self._constants[key].name)
        self._types[name] = helper.np_dtype_to_tensor_dtype(array.dtype)
        return name

    def reshape(self, x: str, *shape: int) -> str:
        """A view; 0 copies the size at its place, -1 is inferred."""
        return self.op("Reshape", x, self.sizes(*shape))

    def by_position(self, x: str, *rest: int) -> str:
        """(tokens, …) to (batch, seq, *rest), with batch and sequence read from the hidden state."""
        if rest not in self._shapes:
            lead = self._shapes.get(()) or self.op("Shape", HIDDEN, start=0, end=2)
            self._shapes[()] = lead
            self._shapes[rest] = self.op("Concat", lead, self.sizes(*rest), axis=0)
        return self.op("Reshape", x, self._shapes[rest])

    def product(self, left: str, right: str, plus: str | None = None, **flips: int) -> str:
        """Left · right + plus of matrices; ``transA=1`` and ``transB=1`` read an operand as its transpose."""
        return self.op("Gemm", left, right, *([] if plus is None else [plus]), **flips)

    def result(self, value: str, name: str) -> None:
        """Make ``value`` the graph's output ``name``."""
        self._results[value] = name

    def model(self, inputs: Sequence[Input], outputs: Sequence[str]) -> Any:
        """The finished model: unneeded inputs and operators dropped, checked.

        Args:
            inputs: Every graph input there may be, in order.
            outputs: Names of the results in order; ``d_x`` and ``next_x`` have the shape of input ``x``, others that of
                the first input.

        Raises:
            TraceError: the graph holds what a bundle may not hold.
        """
        for node in self._nodes:
            node.input[:] = [self._results.get(name, name) for name in node.input]
            node.output[:] = [self._results.get(name, name) for name in node.output]
        shapes = {item.name: _shape(item) for item in inputs}
        first = shapes[inputs[0].name]
        graph = helper.make_graph(
            self._nodes,
            "graph",
            [helper.make_tensor_value_info(item.name, _element_type(item), shapes[item.name]) for item in inputs],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes.get(_input_of(name), first))
                for name in outputs
            ],
            list(self._constants.values()),
        )
        prune(graph)
        graph.value_info.extend(self._inner_values(graph.node, outputs))
        model = helper.make_model(
            graph,
            producer_name="emberlora",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        )
        check(model)
        state_values(model)
        return model

    def _inner_values(self, nodes: Iterable[Any], outputs: Sequence[str]) -> list[onnx.ValueInfoProto]:
        names = [name for node in nodes for name in node.output if name not in outputs]
        return [helper.make_tensor_value_info(name, self._types[name], None) for name in names]


def _input_of(output: str) -> str:
    return output.removeprefix("d_").removeprefix("next_")


def _element_type(item: Input) -> int:
    kinds = {torch.int64: TensorProto.INT64, torch.bool: TensorProto.BOOL}
    return int(kinds.get(item.example.dtype, TensorProto.FLOAT))


def _shape(item: Input) -> list[int | str]:
    return [item.dims.get(axis, size) for axis, size in enumerate(item.example.shape)]
