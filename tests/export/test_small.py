"""The small pieces: chat forms, records, graph passes, errors, the public list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from export_models import CHAT
from jinja2 import Template
from onnx import TensorProto, helper

import export
from edge_runtime.bundle import ChatRole
from export import errors
from export.chat import find_chat
from export.clean import CONTRIB, clean, state_values
from export.errors import DataError, OutputError, TraceError, VerificationError
from export.records import read_labels, read_records
from export.runner import Batch
from export.verify import Case, relative_errors, verified
from export.writer import staged


class Templated:
    """A tokenizer that has nothing but a chat template."""

    def __init__(self, template: str, bos: str = "") -> None:
        self.chat_template, self.bos_token = template, bos

    def apply_chat_template(self, messages: object, tokenize: bool) -> str:
        """Render as transformers does."""
        assert not tokenize
        return Template(self.chat_template).render(messages=messages)


def test_chat_of_wrapped_messages_is_found() -> None:
    """With the default system message as preamble."""
    chat = find_chat(Templated(CHAT), begins_with_bos=False)
    assert chat is not None
    assert chat.roles["assistant"] == ChatRole("<|assistant|>", "<|end|>")
    assert chat.roles["system"] == ChatRole("<|system|>", "<|end|>")
    assert chat.preamble == "<|system|>Default.<|end|>"


def test_chat_leaves_out_the_begin_token_that_is_a_prefix_id() -> None:
    """It would stand twice otherwise."""
    chat = find_chat(Templated("<s>" + CHAT, bos="<s>"), begins_with_bos=True)
    assert chat == find_chat(Templated(CHAT), begins_with_bos=False)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m['role'] }}{{ m['content'] }}{% endfor %}",
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    ],
)
def test_chat_of_another_form_is_none(template: str) -> None:
    """Rather none than a wrong one."""
    assert find_chat(Templated(template), begins_with_bos=False) is None


def test_labels_are_distinct_and_sorted(tmp_path: Path) -> None:
    """From lines of JSON or a table."""
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": "b"}\n\n{"text": "y", "label": "a"}\n{"label": "b"}\n')
    (tmp_path / "a.csv").write_text("text,label\nx,b\ny,a\n")
    assert read_labels(tmp_path / "a.jsonl") == read_labels(tmp_path / "a.csv") == ("a", "b")


@pytest.mark.parametrize("line", ["{", "[1]", '{"label": 3}', '{"text": "no label"}', '{"label": "only one"}'])
def test_bad_labels_are_refused(tmp_path: Path, line: str) -> None:
    """Naming the file."""
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        read_labels(tmp_path / "a.jsonl")


def test_missing_records_are_refused(tmp_path: Path) -> None:
    """As input, not as a crash."""
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(tmp_path / "none.jsonl"))


def _value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _model(
    nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)]
    )


def test_clean_folds_transposes_and_reads_sizes_from_the_first_input() -> None:
    """xᵀ d as one Gemm, a size of ``d`` read from ``x``, and an unused weight dropped."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0]),
        helper.make_node("MatMul", ["xt", "d"], ["y"]),
        helper.make_node("Shape", ["d"], ["n"], start=0, end=1),
    ]
    outputs = [_value("y", 3, 4), helper.make_tensor_value_info("n", TensorProto.INT64, (1,))]
    inputs = [_value("x", "rows", 3), _value("w:unused", 2), _value("d", "rows", 4)]
    model = clean(onnx.shape_inference.infer_shapes(_model(nodes, inputs, outputs)))
    assert [value.name for value in model.graph.input] == ["x", "d"]
    gemm, shape = model.graph.node
    assert (gemm.op_type, list(gemm.input)) == ("Gemm", ["x", "d"])
    assert {attribute.name: attribute.i for attribute in gemm.attribute} == {"transA": 1, "transB": 0}
    assert list(shape.input) == ["x"]


def test_clean_refuses_weights_inside_the_graph() -> None:
    """They would be sent twice and could not be mapped."""
    model = _model([helper.make_node("Add", ["x", "big"], ["y"])], [_value("x", 4096)], [_value("y", 4096)])
    model.graph.initializer.append(helper.make_tensor("big", TensorProto.FLOAT, [4096], np.ones(4096)))
    with pytest.raises(TraceError, match="constants over"):
        clean(model)


def test_clean_refuses_a_value_of_unknown_type() -> None:
    """A device could not cut the graph there; a stated type is kept where onnx knows none."""
    nodes = [helper.make_node("QuickGelu", ["x"], ["h"], domain=CONTRIB), helper.make_node("Neg", ["h"], ["y"])]
    model = _model(nodes, [_value("x", 4)], [_value("y", 4)])
    model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    with pytest.raises(TraceError, match=r"graph: element types unknown: \['v0'\]"):
        clean(model)
    model.graph.value_info.append(helper.make_tensor_value_info("v0", TensorProto.FLOAT, None))
    state_values(model)
    assert [value.name for value in model.graph.value_info] == ["v0"]


def test_relative_errors_count_missing_tensors_as_infinite() -> None:
    """A gradient that is not there is as wrong as can be."""
    one = np.ones(4, np.float32)
    assert relative_errors({"a": one * 1.5}, {"a": one, "b": one}) == {"a": pytest.approx(0.5), "b": float("inf")}


def test_staged_folder_appears_only_when_all_went_well(tmp_path: Path) -> None:
    """A failure inside leaves the old folder as it was and nothing else."""
    out = tmp_path / "out"
    with staged(out) as folder:
        (folder / "new").touch()
        assert not out.exists()
    with pytest.raises(FileNotFoundError), staged(out) as folder:
        (folder / "newer").rename(folder / "newest")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [out]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"), staged(tmp_path / "file" / "out"):
        pass


def test_error_tree_is_the_one_drawn() -> None:
    """Every error is one of the user's or one of the exporter's, and stands in the picture."""
    drawn = errors.__doc__ or ""
    for name, kind in vars(errors).items():
        if isinstance(kind, type):
            assert name in drawn
            assert name == "ExportError" or issubclass(kind, (errors.ExportInputError, errors.ExportFailedError))


def test_public_list() -> None:
    """The package's surface is what it says."""
    assert sorted(export.__all__) == export.__all__
    assert all(hasattr(export, name) for name in export.__all__)


def test_rounding_excuses_what_it_explains() -> None:
    """A gradient may be as far off as PyTorch's own float32, up to a cap; no other may."""
    case = Case("2x12", Batch(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64)), {}, {})
    assert verified(case, {"a": 2e-4, "b": 1e-6}, {"a": 3e-4}).max_rel_err == 2e-4
    for off, rounding in (
        ({"a": 2e-4}, None),
        ({"a": 2e-4}, {"a": 1.5e-4}),
        ({"a": 2e-4}, {"b": 1.0}),
        ({"a": 2e-2}, {"a": 1.0}),
        ({"a": float("nan")}, {"a": 1.0}),
        ({"a": float("inf")}, {"a": float("inf")}),
    ):
        with pytest.raises(VerificationError, match="2x12: a: relative error: expected at most"):
            verified(case, off, rounding)
