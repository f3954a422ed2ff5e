"""Cutting variants out of a joint graph, on a graph small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edge_runtime.engine.errors import GraphError
from edge_runtime.engine.graph import JointGraph
from edge_runtime.engine.onnx_schema import Message
from edge_runtime.engine.runtime import open_session

FLOAT = TensorProto.FLOAT


def written() -> onnx.ModelProto:
    """out = tanh(x W' + (x A') B'), with gradients; h = x A' and out are what the backward pass needs."""
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["base"], "base", transB=1),
        helper.make_node("Gemm", ["x", "a"], ["h"], "h", transB=1),
        helper.make_node("Gemm", ["h", "b", "base"], ["z"], "z", transB=1),
        helper.make_node("Tanh", ["z"], ["out"], "out"),
        helper.make_node("Mul", ["out", "out"], ["square"], "square"),
        helper.make_node("Sub", ["one", "square"], ["slope"], "slope"),
        helper.make_node("Mul", ["d_out", "slope"], ["dz"], "dz"),
        helper.make_node("Transpose", ["h"], ["ht"], "ht", perm=[1, 0]),
        helper.make_node("Gemm", ["dz", "h"], ["d_b"], "d_b", transA=1),
        helper.make_node("Gemm", ["dz", "b"], ["dh"], "dh"),
        helper.make_node("Gemm", ["dh", "x"], ["d_a"], "d_a", transA=1),
        helper.make_node("Gemm", ["dz", "w"], ["dx0"], "dx0"),
        helper.make_node("Gemm", ["dh", "a", "dx0"], ["d_x"], "d_x"),
        helper.make_node("MatMul", ["ht", "dz"], ["d_b_turned"], "d_b_turned"),
    ]
    inputs = {"x": ["n", 4], "w": [3, 4], "a": ["r", 4], "b": [3, "r"], "d_out": ["n", 3]}
    outputs = {"out": ["n", 3], "d_x": ["n", 4], "d_a": ["r", 4], "d_b": [3, "r"], "d_b_turned": ["r", 3]}
    graph = helper.make_graph(
        nodes,
        "joint",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()],
        [helper.make_tensor("one", FLOAT, [], [1.0])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def joint() -> JointGraph:
    return JointGraph(onnx.shape_inference.infer_shapes(written()).SerializeToString(), name="joint")


def run(model: Message, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = open_session(model.SerializeToString())
    return session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (5, 4), "w": (3, 4), "a": (2, 4), "b": (3, 2), "d_out": (5, 3)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_forward_knows_nothing_of_gradients() -> None:
    """The forward variant has the four forward nodes and does not ask for d_out."""
    model = joint().derive(["out"])
    assert [node.name for node in model.graph.node] == ["base", "h", "z", "out"]
    assert {value.name for value in model.graph.input} == {"x", "w", "a", "b"}


def test_killed_factor_leaves_the_graph() -> None:
    """Without A's gradient its product and what only it needs are gone, and no output of that name is left."""
    graph = joint()
    both = graph.derive(["d_a", "d_b"])
    only_b = graph.derive(["d_b"])
    gone = {node.name for node in both.graph.node} - {node.name for node in only_b.graph.node}
    assert gone == {"dh", "d_a"}
    assert [value.name for value in only_b.graph.output] == ["d_b"]
    assert graph.node_count(["d_b"]) == len(only_b.graph.node) == len(both.graph.node) - 2


def test_lowest_block_needs_no_input_gradient() -> None:
    """Not asking for the input's gradient drops the product with the frozen weight."""
    names = {node.name for node in joint().derive(["d_a", "d_b"]).graph.node}
    assert not names & {"dx0", "d_x"}


def test_boundary_is_what_backward_reads_of_forward() -> None:
    """Backward needs h only for B and the output's slope; a view of h is repeated instead of kept twice."""
    graph = joint()
    assert graph.boundary(["out"], ["d_b"]) == ("h", "out")
    assert graph.boundary(["out"], ["d_a"]) == ("out",)
    assert graph.boundary(["out"], ["d_b_turned"]) == ("h", "out")


@pytest.mark.parametrize("wanted", [["d_a"], ["d_b"], ["d_x"], ["d_a", "d_b", "d_x", "d_b_turned"]])
def test_kept_and_recomputed_agree(wanted: list[str]) -> None:
    """Backward from kept activations equals backward from the input."""
    graph, given = joint(), feeds()
    kept = graph.boundary(["out"], wanted)
    forward = dict(
        zip(["out", *kept], run(graph.derive(["out", *[k for k in kept if k != "out"]]), given), strict=False)
    )
    split = run(graph.derive(wanted, kept), {**given, **forward})
    whole = run(graph.derive(wanted), given)
    for left, right in zip(split, whole, strict=True):
        np.testing.assert_array_equal(left, right)


def test_unknown_output_is_named() -> None:
    """A manifest that asks for what the graph does not make gets one clear line."""
    with pytest.raises(GraphError, match="joint: makes no tensor 'd_c'"):
        joint().derive(["d_c"])


def test_broken_file_is_named(tmp_path: Path) -> None:
    """Bytes that are no ONNX model, and a model without nodes, are refused by file name."""
    broken = tmp_path / "block.onnx"
    broken.write_bytes(b"\xff\xff not a model")
    with pytest.raises(GraphError, match=r"block\.onnx: not an ONNX model"):
        JointGraph.load(broken)
    broken.write_bytes(b"")
    with pytest.raises(GraphError, match=r"block\.onnx: holds no nodes"):
        JointGraph.load(broken)
    with pytest.raises(GraphError, match=r"gone\.onnx: cannot be read"):
        JointGraph.load(tmp_path / "gone.onnx")


def test_missing_element_types_are_one_clear_line() -> None:
    """A bundle of an older exporter, which left them to the device, is refused where it is read."""
    with pytest.raises(GraphError, match=r"joint: no element type for tensor 'base' and 8 others: .* export"):
        JointGraph(written().SerializeToString(), name="joint")
