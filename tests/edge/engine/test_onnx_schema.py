"""Graphs cut with our own schema are those that the package ``onnx`` would have cut, message by message."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.engine import onnx_schema
from edge_runtime.engine.errors import GraphError
from edge_runtime.engine.graph import JointGraph
from edge_runtime.engine.onnx_schema import ModelProto

ROOT = Path(__file__).parents[3]
Cut = tuple[tuple[str, ...], tuple[str, ...]]  # outputs, tensors taken as given


@pytest.fixture(scope="module", params=["bert_bundle", "llama_bundle"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return open_bundle(request.getfixturevalue(request.param))


def graph_files(bundle: Bundle) -> list[Path]:
    found = sorted(bundle.path("graphs").iterdir())
    assert len(found) > 2
    return found


def cuts(graph: JointGraph) -> Iterator[Cut]:
    """All outputs, every output alone, and for a block the passes of a step with A, B or one factor killed."""
    everything = tuple(graph.outputs)
    yield everything, ()
    yield from (((name,), ()) for name in everything)
    if "d_hidden" not in everything:
        return
    gradients = [name for name in everything if name != "out"]
    killed = [lambda name: False, lambda name: "lora_a" in name, lambda name: "lora_b" in name]
    killed += [lambda name, one=one: name == one for one in gradients]
    for dead in killed:
        wanted = tuple(name for name in gradients if not dead(name))
        kept = graph.boundary(("out",), wanted)
        yield tuple(dict.fromkeys(("out", *kept))), ()
        yield wanted, kept


def cut_by_onnx(model: onnx.ModelProto, outputs: tuple[str, ...], given: tuple[str, ...]) -> onnx.ModelProto:
    """The oracle: walk the nodes from the last to the first and keep those that make something wanted."""
    wanted, nodes = set(outputs) - set(given), []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            nodes.insert(0, node)
            wanted |= set(node.input) - set(given)
    read = {name for node in nodes for name in node.input} | set(outputs)
    values = {value.name: value for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    graph = helper.make_graph(
        nodes,
        model.graph.name,
        [value for value in model.graph.input if value.name in read and value.name not in given]
        + [values[name] for name in given if name in read],
        [values[name] for name in outputs],
        [tensor for tensor in model.graph.initializer if tensor.name in read],
    )
    made = helper.make_model(graph, producer_name="emberlora", opset_imports=model.opset_import)
    made.ir_version = model.ir_version
    return made


def test_every_cut_is_the_one_of_onnx(bundle: Bundle) -> None:
    """Attributes, constants, shapes and types included, though our schema names hardly any of them."""
    for path in graph_files(bundle):
        graph, model = JointGraph.load(path), onnx.load(path)
        for outputs, given in cuts(graph):
            found = onnx.load_model_from_string(graph.derive(outputs, given).SerializeToString())
            assert found == cut_by_onnx(model, outputs, given), (path.name, outputs, given)


def test_a_graph_survives_the_round_trip(bundle: Bundle) -> None:
    """What has no name in our schema is written as it came."""
    for path in graph_files(bundle):
        data = ModelProto.FromString(path.read_bytes()).SerializeToString()
        assert onnx.load_model_from_string(data) == onnx.load(path)


def test_fields_without_a_name_survive() -> None:
    """Every kind of attribute, a subgraph in one of them, metadata, and fields that no schema has yet."""
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "inner", [], [onnx.ValueInfoProto(name="z")]
    )
    tensor = helper.make_tensor("t", TensorProto.INT8, [2], [1, -2])
    attributes = {
        "f": 0.5,
        "i": -3,
        "s": "text",
        "t": tensor,
        "g": inner,
        "floats": [1.0, 2.0],
        "ints": [],
        "strings": ["a"],
    }
    attributes["ints"] = [2**40, -1]
    node = helper.make_node("Odd", ["x"], ["y"], name="n", domain="com.example", doc_string="why", **attributes)
    model = helper.make_model(
        helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["n", 3, None])])
    )
    helper.set_model_props(model, {"key": "value"})
    data = model.SerializeToString() + bytes.fromhex("fa3f03616263")  # field 1023: "abc"
    again = ModelProto.FromString(data).SerializeToString()
    assert onnx.load_model_from_string(again) == onnx.load_model_from_string(data)
    assert b"abc" in again


def test_numbers_and_types_are_those_of_onnx() -> None:
    """Field by field against the descriptors of the real package, which are loaded beside ours."""
    theirs = {"TensorTypeProto": onnx.TypeProto.Tensor}
    for message, fields in onnx_schema._MESSAGES.items():
        real = theirs.get(message, getattr(onnx, message, None)).DESCRIPTOR.fields_by_name
        ours = onnx_schema._pool.FindMessageTypeByName(f"emberlora.onnx.{message}").fields_by_name
        assert set(fields) == set(ours)
        for name, field in ours.items():
            known = real[name]
            kind = known.TYPE_INT32 if known.type == known.TYPE_ENUM else known.type  # the same on the wire
            assert (field.number, field.type, field.is_repeated) == (known.number, kind, known.is_repeated), name
    for name in ("UNDEFINED", "FLOAT", "INT64", "EXTERNAL"):
        assert getattr(onnx_schema, name) == getattr(TensorProto, name)


@pytest.mark.parametrize("order", ["onnx, edge_runtime.engine.onnx_schema", "edge_runtime.engine.onnx_schema, onnx"])
def test_both_schemas_live_in_one_process(order: str) -> None:
    """In either order of import: protobuf refuses two descriptors of one name in one pool."""
    code = f"import {order}; m = onnx.ModelProto(ir_version=7); print(m.ir_version)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("7\n", "")


BROKEN = {
    "a graph that claims more bytes than there are": b"\x3a\x05\x0a\x03",
    "a node whose input is cut off": b"\x3a\x04\x0a\x02\x0a\xff",
    "an operator whose name is not UTF-8": b"\x3a\x06\x0a\x04\x22\x02\xff\xfe",
    "a group that never ends": b"\x3b",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_broken_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(GraphError, match="block: not an ONNX model"):
        JointGraph(data, name="block")


def test_protobuf_without_its_compiled_part(llama_bundle: Path) -> None:
    """As on systems for which there is no wheel of it: the same cut byte for byte, the same refusals."""
    path = open_bundle(llama_bundle).path("graphs/block.onnx")
    wanted = JointGraph.load(path).derive(["out"]).SerializeToString()
    code = f"""
import sys
from pathlib import Path
from edge_runtime.engine.errors import GraphError
from edge_runtime.engine.graph import JointGraph
for data in {list(BROKEN.values())!r}:
    try:
        JointGraph(data, name="block")
    except GraphError:
        continue
    sys.exit(f"accepted: {{data}}")
print(JointGraph.load(Path({str(path)!r})).derive(["out"]).SerializeToString().hex())
"""
    environment = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == (wanted.hex() + "\n", "")
