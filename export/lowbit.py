"""How graphs read frozen weights that are stored in fewer bits (see :mod:`export.storage`).

A matrix is turned back to float32 right before each use and dropped after it, so that at no time more than one of them
exists in full precision, and the gradient sees the very weights the forward pass saw. Where all uses follow each other,
as in the vocabulary's graph, it is turned back once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edge_runtime.bundle import SCALE_SUFFIX, Array, Base
from export.storage import GROUP

_STORED_TYPE = {"fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8, "int4": TensorProto.UINT8}


def lower(model: Any, storages: Mapping[str, Base], *, once: bool = False) -> None:
    """Make a graph read its ``w:`` inputs as they are stored, each with its scale as another input; edits ``model``.

    Args:
        model: A finished graph, an ``onnx.ModelProto``.
        storages: How each weight is stored, by the name of its graph input.
        once: Restore a matrix once for all of its products, for graphs that hold no other.
    """
    graph = model.graph
    for value in list(graph.input):
        storage = storages.get(value.name, "fp32")
        if storage == "fp32":
            continue
        value.type.tensor_type.elem_type = _STORED_TYPE[storage]
        if storage != "fp16":
            graph.input.append(_scale_input(value, storage))
        columns = value.type.tensor_type.shape.dim[1].dim_value
        _Reader(graph, value.name, storage, columns=columns).rewrite(once=once)
        if storage == "int4":
            value.type.tensor_type.shape.dim[1].dim_value = columns // 2


def with_scales(names: Sequence[str], storages: Mapping[str, Base]) -> tuple[str, ...]:
    """The weights of a graph with the scales that it reads now; ``storages`` as for :func:`lower`."""
    scaled = [name + SCALE_SUFFIX for name in names if storages[f"w:{name}"] in ("int8", "int4")]
    return (*names, *scaled)


def _scale_input(value: Any, storage: Base) -> Any:
    dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
    shape, kind = ([dims[0]], TensorProto.FLOAT)
    if storage == "int4":
        shape, kind = [dims[0], dims[1] // GROUP], TensorProto.FLOAT16
    return helper.make_tensor_value_info(value.name + SCALE_SUFFIX, kind, shape)


class _Reader:
    """Puts operators that restore one weight before each operator that reads it."""

    def __init__(self, graph: Any, name: str, storage: Base, *, columns: int) -> None:
        self._graph, self._name, self._storage, self._columns = graph, name, storage, columns
        self._new: list[Any] = []
        self._made = 0

    def rewrite(self, *, once: bool) -> None:
        nodes = []
        read = None
        for node in self._graph.node:
            if self._name in node.input:
                self._new = []
                if _takes_rows(node, self._name):  # rows first: the table is large
                    self._gathered(node)
                    nodes += self._new
                    continue
                if read is None or not once:
                    read = self._restore(self._name, self._name + SCALE_SUFFIX)
                node.input[:] = [read if name == self._name else name for name in node.input]
                nodes += self._new
            nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _gathered(self, node: Any) -> None:
        """The node itself made again over stored rows, then restored into the shape that was asked for."""
        ids = node.input[1]
        rows = self._matrix(self._op("Gather", _STORED_TYPE[self._storage], self._name, ids, axis=0))
        scale = ""
        if self._storage != "fp16":
            of_rows = self._op("Gather", self._scale_type, self._name + SCALE_SUFFIX, ids, axis=0)
            scale = self._matrix(of_rows) if self._storage == "int4" else self._reshape(of_rows, -1)
        restored_rows = self._restore(rows, scale)
        size = self._op("Concat", TensorProto.INT64, self._op("Shape", TensorProto.INT64, ids), self._sizes(-1), axis=0)
        self._new.append(helper.make_node("Reshape", [restored_rows, size], [node.output[0]], f"{node.name}_restored"))

    def _matrix(self, name: str) -> str:
        size = self._op("Shape", TensorProto.INT64, name, start=-1)
        return self._op(
            "Reshape",
            self._type(name),
            name,
            self._op("Concat", TensorProto.INT64, self._sizes(-1), size, axis=0),
        )

    def _restore(self, matrix: str, scale: str) -> str:
        if self._storage == "fp16":
            return self._op("Cast", TensorProto.FLOAT, matrix, to=TensorProto.FLOAT)
        if self._storage == "int8":
            return self._op("DequantizeLinear", TensorProto.FLOAT, matrix, scale, axis=0)
        low = self._op("BitwiseAnd", TensorProto.UINT8, matrix, self._byte(15))
        high = self._op("BitShift", TensorProto.UINT8, matrix, self._byte(4), direction="RIGHT")
        levels = self._op("Concat", TensorProto.UINT8, low, high, axis=1)
        centred = self._op("Sub", TensorProto.FLOAT, self._float(levels), self._number(8.0))
        grouped = self._reshape(centred, -1, self._columns // GROUP, GROUP)
        wide = self._op("Unsqueeze", TensorProto.FLOAT, self._float(scale), self._sizes(2))
        return self._reshape(self._op("Mul", TensorProto.FLOAT, grouped, wide), -1, self._columns)

    @property
    def _scale_type(self) -> int:
        return int(TensorProto.FLOAT16 if self._storage == "int4" else TensorProto.FLOAT)

    def _type(self, name: str) -> int:
        return next(int(v.type.tensor_type.elem_type) for v in reversed(self._graph.value_info) if v.name == name)

    def _float(self, name: str) -> str:
        return self._op("Cast", TensorProto.FLOAT, name, to=TensorProto.FLOAT)

    def _reshape(self, name: str, *shape: int) -> str:
        return self._op("Reshape", TensorProto.FLOAT, name, self._sizes(*shape))

    def _op(self, kind: str, made: int, *inputs: str, **attributes: Any) -> str:
        name = f"{self._name}/{self._made}"
        self._made += 1
        self._new.append(helper.make_node(kind, inputs, [name], f"{kind}_{name}", **attributes))
        self._graph.value_info.append(helper.make_tensor_value_info(name, made, None))
        return name

    def _byte(self, value: int) -> str:
        return self._constant(np.asarray(value, np.uint8))

    def _number(self, value: float) -> str:
        return self._constant(np.asarray(value, np.float32))

    def _sizes(self, *values: int) -> str:
        return self._constant(np.asarray(values, np.int64))

    def _constant(self, array: Array) -> str:
        name = f"{array.dtype}:{'x'.join(str(value) for value in np.ravel(array))}:{array.ndim}"
        if all(tensor.name != name for tensor in self._graph.initializer):
            self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name


def _takes_rows(node: Any, table: str) -> bool:
    axes = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
    return bool(node.op_type == "Gather" and node.input[0] == table and axes in ([], [0]))
