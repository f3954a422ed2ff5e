"""The fast form of a block graph: products with frozen weights in int8, everything else in float32.

After SwitchBack (Wortsman et al., arXiv 2304.13013): the product of the forward pass and that of the input gradient
are int8, the gradients of what is trained stay float32. A frozen weight has no gradient of its own, so both of its
products are. Activations and gradients are divided by the largest magnitude of their row first, because decoders have
outliers, and the operator quantises what is then between -1 and 1. Rows that a layer norm made are of one size already.
Those of an RMS norm are not: the few tokens with a decoder's massive activations (Sun et al., arXiv 2402.17762) would
set the scale for all others, and SmolLM2-135M's gradients be 40 instead of 29 % off.

A weight (out, in) that a product reads becomes three inputs: ``q:{weight}`` int8 (out, in), ``qt:{weight}`` the same
transposed, and ``qs:{weight}`` float32 (out,), so that weight = qs · q. Both products use the same integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.clean import CONTRIB, check, prune

_EVEN = frozenset({"LayerNormalization"})
_ONE, _TINY, _AXIS = "fast:one", "fast:tiny", "fast:axis"


def fast_form(model: Any, weights: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """A copy of a block graph with int8 products.

    Args:
        model: The float32 joint graph.
        weights: Names of its frozen weights.

    Returns:
        The graph, and the weights it reads in int8; all others are still ``w:`` inputs.

    Raises:
        TraceError: the graph holds what a bundle may not hold.
    """
    fast = onnx.ModelProto()
    fast.CopyFrom(model)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in fast.graph.input}
    matrices = {f"w:{name}" for name in weights if len(shapes[f"w:{name}"]) == 2}
    writer = _Writer(fast.graph, {node.output[0] for node in fast.graph.node if node.op_type in _EVEN})
    nodes = list(fast.graph.node)
    del fast.graph.node[:]
    used = {node.input[1] for node in nodes if _is_product(node, matrices)}
    for node in nodes:
        if _is_product(node, matrices):
            writer.product(node)
        else:
            fast.graph.node.append(node)
    quantised = tuple(name for name in weights if f"w:{name}" in used)
    for name in quantised:
        out, inner = shapes[f"w:{name}"]
        for prefix, kind, shape in (
            ("q", TensorProto.INT8, [out, inner]),
            ("qt", TensorProto.INT8, [inner, out]),
            ("qs", TensorProto.FLOAT, [out]),
        ):
            fast.graph.input.append(helper.make_tensor_value_info(f"{prefix}:{name}", kind, shape))
    _add_opset(fast)
    prune(fast.graph)
    check(fast)
    return fast, quantised


def _is_product(node: Any, matrices: set[str]) -> bool:
    if node.op_type != "Gemm" or node.input[1] not in matrices:
        return False
    settings = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return not settings.get("transA") and {settings.get("alpha", 1.0), settings.get("beta", 1.0)} == {1.0}


def _add_opset(model: Any) -> None:
    if all(item.domain != CONTRIB for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


class _Writer:
    """Appends the int8 forms of products; rows that several products read are scaled once."""

    def __init__(self, graph: Any, even: set[str]) -> None:
        """Args: the graph, without products; values whose rows are of one size."""
        self._graph, self._even = graph, even
        self._scaled: dict[str, tuple[str, str]] = {}
        for name, array in ((_ONE, np.ones(1)), (_TINY, np.full(1, 1e-30))):
            graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
        graph.initializer.append(numpy_helper.from_array(np.asarray([1], np.int64), _AXIS))

    def product(self, node: Any) -> None:
        """x Wᵀ + c with the scale of each row of W inside the operator, or x W + c with it on x's columns."""
        x, weight = node.input[0], node.input[1].removeprefix("w:")
        forward = any(item.name == "transB" and item.i for item in node.attribute)
        if not forward:
            x = self._op("Mul", x, f"qs:{weight}")
        sides = (f"qt:{weight}", f"qs:{weight}") if forward else (f"q:{weight}", _ONE)
        plus = list(node.input[2:])
        if x in self._even:
            made = self._op("DynamicQuantizeMatMul", x, *sides, output=None if plus else node.output[0])
        else:
            rows, size = self._scale_rows(x)
            made = self._op("DynamicQuantizeMatMul", rows, *sides)
            made = self._op("Mul", made, size, output=None if plus else node.output[0])
        if plus:
            self._op("Add", made, *plus, output=node.output[0])

    def _scale_rows(self, x: str) -> tuple[str, str]:
        """The rows divided by their largest magnitude, and that magnitude (tokens, 1)."""
        if x not in self._scaled:
            largest = self._op("ReduceMax", self._op("Abs", x), _AXIS, keepdims=1)
            size = self._op("Max", largest, _TINY)
            self._scaled[x] = self._op("Div", x, size), size
        return self._scaled[x]

    def _op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"fast:{len(self._graph.node)}"
        domain = CONTRIB if kind == "DynamicQuantizeMatMul" else ""
        self._graph.node.append(helper.make_node(kind, inputs, [name], f"{kind}_{name}", domain=domain, **attributes))
        if output is None:
            self._graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        return name
