"""Makes a traced graph small, plain and reproducible, and checks that it keeps the bundle's contract.

Passes edit the graph in place; each leaves it valid. Shapes are those the exporter noted: ints and symbol names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.errors import TraceError

IR_VERSION = 10  # the newest that onnxruntime 1.23.2, the last for Python 3.10, is sure to read
MAX_CONSTANT_BYTES = 4096
CONTRIB = "com.microsoft"  # operators that stock onnxruntime has beside the standard ones
# In onnxruntime's own set of the default domain, so that onnx's checker does not know it.
_UNCHECKED = "SimplifiedLayerNormalization"
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div"}

Shape = tuple[int | str, ...]


def clean(model: Any) -> Any:
    """Run every pass and return the finished model.

    Args:
        model: An ``onnx.ModelProto`` with value shapes; it is changed.

    Raises:
        TraceError: the graph still holds what a bundle may not hold.
    """
    graph = model.graph
    shapes = _shapes(graph)
    _read_sizes_from_first_input(graph, shapes)
    _drop_expands(graph, shapes)
    _transposes_into_gemm(graph, shapes)
    prune(graph)
    _rename(graph)
    _strip(model)
    check(model)
    state_values(model)
    return model


def ancestors(graph: Any, outputs: Iterable[str]) -> set[str]:
    """Names of all values that ``outputs`` are computed from, themselves included."""
    makers = {name: node for node in graph.node for name in node.output}
    seen: set[str] = set()
    waiting = list(outputs)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in makers:
            waiting.extend(item for item in makers[name].input if item)
    return seen


def _shapes(graph: Any) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims)
    for tensor in graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
    return shapes


def _read_sizes_from_first_input(graph: Any, shapes: Mapping[str, Shape]) -> None:
    """Read every symbolic size from the first input that has it, and read it once.

    A size read from the incoming gradient, the last input, would make the forward pass ask for a gradient.
    """
    places: dict[int | str, tuple[str, int]] = {}
    for value in graph.input:
        for axis, size in enumerate(shapes.get(value.name, ())):
            if isinstance(size, str):
                places.setdefault(size, (value.name, axis))
    users, found = _users(graph), dict[tuple[str, int], str]()
    for node in [node for node in graph.node if node.op_type == "Shape"]:
        span = {attribute.name: attribute.i for attribute in node.attribute}
        start, known = span.get("start", 0), shapes.get(node.input[0], ())
        if span.get("end") != start + 1 or not 0 <= start < len(known) or known[start] not in places:
            continue
        place = places[known[start]]
        if place in found:
            _replace(users, node.output[0], found[place])
            graph.node.remove(node)
            continue
        found[place] = node.output[0]
        node.input[0] = place[0]
        del node.attribute[:]
        node.attribute.extend([helper.make_attribute("start", place[1]), helper.make_attribute("end", place[1] + 1)])


def _drop_expands(graph: Any, shapes: Mapping[str, Shape]) -> None:
    """Elementwise operators broadcast by themselves; an Expand to the shape it already has does nothing."""
    users = _users(graph)
    produced = {value.name for value in graph.output}
    for node in [node for node in graph.node if node.op_type == "Expand"]:
        source, target = node.input[0], node.output[0]
        full = shapes.get(target)
        if full is None or "" in full or target in produced:
            continue
        if shapes.get(source) == full or all(_broadcasts(user, target, full, shapes) for user in users.get(target, [])):
            _replace(users, target, source)
            graph.node.remove(node)


def _broadcasts(user: Any, name: str, full: Shape, shapes: Mapping[str, Shape]) -> bool:
    others = [item for item in user.input if item != name]
    return user.op_type in _ELEMENTWISE and len(others) == 1 and shapes.get(others[0]) == full


def _transposes_into_gemm(graph: Any, shapes: Mapping[str, Shape]) -> None:
    """``MatMul`` of matrices with a transposed operand becomes ``Gemm``, which reads it as it lies.

    A transposed product swaps its operands: (A B)ᵀ = Bᵀ Aᵀ.
    """
    makers = {name: node for node in graph.node for name in node.output}
    users = _users(graph)
    for node in graph.node:
        if node.op_type != "MatMul" or any(len(shapes.get(name, ())) != 2 for name in node.input):
            continue
        flips = [_flipped(makers.get(name)) for name in node.input]
        sides = [(flip or name, int(flip is not None)) for flip, name in zip(flips, node.input, strict=True)]
        following = users.get(node.output[0], [])
        turned = len(following) == 1 and _flipped(following[0]) is not None
        if not turned and not any(flag for _, flag in sides):
            continue
        (left, trans_a), (right, trans_b) = sides
        output = node.output[0]
        if turned:
            left, trans_a, right, trans_b = right, 1 - trans_b, left, 1 - trans_a
            output = following[0].output[0]
        _become_gemm(node, (left, right), (trans_a, trans_b))
        if turned:
            graph.node.remove(following[0])
            node.output[0] = output


def _flipped(node: Any) -> str | None:
    """The input of a matrix transposition, or None when ``node`` is not one."""
    if node is None or node.op_type != "Transpose":
        return None
    perm = [list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
    return str(node.input[0]) if perm == [[1, 0]] else None


def _become_gemm(node: Any, sides: tuple[str, str], flips: tuple[int, int]) -> None:
    del node.input[:], node.attribute[:]
    node.op_type = "Gemm"
    node.input.extend(sides)
    node.attribute.extend(
        helper.make_attribute(name, flag) for name, flag in zip(("transA", "transB"), flips, strict=True)
    )


def prune(graph: Any) -> None:
    """Drop what no output needs: nodes, constants, and inputs that stand for unused weights or shared tensors."""
    needed = ancestors(graph, [value.name for value in graph.output])
    for values in (graph.node, graph.initializer, graph.input):
        kept = [item for item in values if any(name in needed for name in getattr(item, "output", None) or [item.name])]
        del values[:]
        values.extend(kept)


def _rename(graph: Any) -> None:
    """Give nodes and inner values short names in order, so that equal graphs are equal bytes."""
    fixed = {value.name for value in [*graph.input, *graph.output]}
    _sort(graph)
    names: dict[str, str] = {}
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    order = [name for node in graph.node for name in node.input if name in initializers]
    ordered = [initializers[name] for name in dict.fromkeys(order)]
    for number, tensor in enumerate(ordered):
        names[tensor.name] = tensor.name = f"c{number}"
    del graph.initializer[:]
    graph.initializer.extend(ordered)
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{number}"
        for place, name in enumerate(node.output):
            if name not in fixed:
                names[name] = f"v{number}" if place == 0 else f"v{number}_{place}"
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def _sort(graph: Any) -> None:
    """Order nodes so that every value is made before it is used, keeping the given order where it can."""
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    waiting = list(graph.node)
    ordered = []
    while waiting:
        left = []
        for node in waiting:
            if all(name in known for name in node.input):
                known.update(node.output)
                ordered.append(node)
            else:
                left.append(node)
        if len(left) == len(waiting):
            raise TraceError(f"graph: cyclic or incomplete at node {waiting[0].name}")
        waiting = left
    del graph.node[:]
    graph.node.extend(ordered)


def _strip(model: Any) -> None:
    """Remove what names this machine or this run: stack traces, producer, inner shapes."""
    graph = model.graph
    del graph.value_info[:], model.metadata_props[:], graph.metadata_props[:]
    for item in [*graph.node, *graph.input, *graph.output, *graph.initializer]:
        item.doc_string = ""
        del item.metadata_props[:]
    graph.name, graph.doc_string, model.doc_string = "graph", "", ""
    model.producer_name, model.producer_version, model.domain = "emberlora", "", ""
    model.ir_version = IR_VERSION


def check(model: Any) -> None:
    """Demand that a graph holds only what a bundle may hold, and state only the operator sets it uses.

    Raises:
        TraceError: naming everything else.
    """
    problems = []
    if len(model.functions):
        problems.append("it has local functions")
    domains = {node.domain for node in model.graph.node}
    if domains - {"", CONTRIB}:
        problems.append(f"operators of domains {sorted(domains - {'', CONTRIB})}")
    large = [tensor.name for tensor in model.graph.initializer if _size(tensor) > MAX_CONSTANT_BYTES]
    if large:
        problems.append(f"constants over {MAX_CONSTANT_BYTES} bytes: {large[:3]}")
    if problems:
        raise TraceError("graph: " + "; ".join(problems))
    opsets = [item for item in model.opset_import if item.domain in {"", *domains}]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    try:
        onnx.checker.check_model(_checkable(model))
    except onnx.checker.ValidationError as error:
        raise TraceError(f"graph: not valid ONNX: {error}") from error


def state_values(model: Any) -> None:
    """Write the element type of every inner value into the graph, and its shape where that is known.

    A device cuts the graph anywhere and infers nothing. Types that the graph states already are kept:
    ``onnx.shape_inference`` knows no operator of ``com.microsoft``.

    Raises:
        TraceError: a value's type is neither stated nor follows from its operator.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    values = {value.name: value for value in inferred if value.type.tensor_type.elem_type}
    outputs = {value.name for value in model.graph.output}
    inner = [name for node in model.graph.node for name in node.output if name and name not in outputs]
    unknown = [name for name in inner if name not in values]
    if unknown:
        raise TraceError(f"graph: element types unknown: {unknown[:3]}")
    del model.graph.value_info[:]
    model.graph.value_info.extend(values[name] for name in inner)


def _checkable(model: Any) -> Any:
    """The model with operators that onnx does not know moved to a domain it does not check."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == _UNCHECKED:
            node.domain = CONTRIB
    return copy


def _size(tensor: Any) -> int:
    return int(np.asarray(numpy_helper.to_array(tensor)).nbytes)


def _users(graph: Any) -> dict[str, list[Any]]:
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            users.setdefault(name, []).append(node)
    return users


def _replace(users: dict[str, list[Any]], old: str, new: str) -> None:
    for user in users.pop(old, []):
        user.input[:] = [new if name == old else name for name in user.input]
        users.setdefault(new, []).append(user)
