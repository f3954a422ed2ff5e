"""Whole exports of tiny models: the contract of the bundle, and gradients as autograd has them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import export_models
import numpy as np
import onnx
import pytest
from export_sessions import LABELS, Exported

from edge_runtime.bundle import MANIFEST_NAME, open_bundle
from export import ExportFailedError, ExportOptions, export_bundle, pipeline
from export.clean import IR_VERSION, MAX_CONSTANT_BYTES, ancestors
from export.errors import DataError, OutputError, TargetError, VerificationError
from export.quiet import quiet
from export.sources import find_source, load
from export.verify import TOLERANCE, verify


@pytest.fixture(params=["bert", "llama", "qwen2"])
def made(request: pytest.FixtureRequest) -> Exported:
    """Each of the shared exports."""
    exported: Exported = request.getfixturevalue(request.param)
    return exported


def test_every_gradient_is_autograds(made: Exported) -> None:
    """Two shapes and two rank assignments were compared, of decoders in both forms, and the worst error is small."""
    forms = ["", ", long form"] if made.bundle.manifest.task == "lm" else [""]
    cases = ["2x12 full ranks", "2x12 mixed ranks", "1x20 full ranks", "1x20 mixed ranks"]
    assert [case.name for case in made.report.cases] == [case + form for case in cases for form in forms]
    assert 0 < made.report.max_rel_err <= TOLERANCE


def test_graphs_have_the_names_of_the_contract(made: Exported) -> None:
    """Inputs and outputs are exactly those that the manifest's docstrings state."""
    manifest = made.bundle.manifest
    for kind in manifest.kinds:
        slots = [slot.name for slot in kind.slots]
        lora = {f"{part}:{slot}" for slot in slots for part in ("lora_a", "lora_b", "scale")}
        gradients = {f"d_lora_{factor}:{slot}" for slot in slots for factor in "ab"}
        weights = {f"w:{name}" for name in kind.weights}
        assert (kind.long is not None) == (manifest.task == "lm")
        for graph in (kind.graph, kind.long or kind.graph):
            assert _names(made, graph) == (
                {"hidden", "d_out", *kind.shared, *weights, *lora},
                {"out", "d_hidden", *gradients},
            )
    assert _names(made, manifest.embed.graph) == (
        {"input_ids", "attention_mask", *(f"w:{name}" for name in manifest.embed.weights)},
        {"hidden", *manifest.embed.shared},
    )
    params = [param.name for param in manifest.head.params]
    vocabulary = manifest.head.vocabulary
    if vocabulary is not None:
        state = ("top", "total", "gold", "pull", "target")
        assert _names(made, manifest.head.graph) == (
            {"rows", "d_normed", *(f"w:{name}" for name in manifest.head.weights)},
            {"normed", "d_rows"},
        )
        assert _names(made, vocabulary.graph) == (
            {"normed", "labels", "inside", *state, *(f"w:{name}" for name in vocabulary.weights)},
            {"logits", *(f"next_{name}" for name in state)},
        )
        return
    assert _names(made, manifest.head.graph) == (
        {"rows", "labels", "grad_scale", *(f"w:{n}" for n in manifest.head.weights), *(f"p:{n}" for n in params)},
        {"logits", "loss_sum", "correct", "d_rows", *(f"d_p:{n}" for n in params)},
    )


def _names(made: Exported, graph: str) -> tuple[set[str], set[str]]:
    model = onnx.load(made.bundle.path(graph))
    return {value.name for value in model.graph.input}, {value.name for value in model.graph.output}


def test_graphs_are_plain(made: Exported) -> None:
    """Old runtimes must read them, devices must be able to prune them, and nothing of this machine is inside."""
    for path in made.bundle.path("graphs").iterdir():
        model = onnx.load(path)
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        assert model.ir_version == IR_VERSION
        assert {item.domain: item.version for item in model.opset_import}.items() <= {
            "": 20,
            "com.microsoft": 1,
        }.items()
        assert not model.functions
        assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
        assert all(len(tensor.raw_data) <= MAX_CONSTANT_BYTES for tensor in model.graph.initializer)
        assert not {"Pow", "Loop", "If"} & {node.op_type for node in model.graph.node}
        assert b"site-packages" not in path.read_bytes()


def test_every_value_states_its_element_type(made: Exported) -> None:
    """As ``onnx.shape_inference`` finds them where it knows the operator; a device infers nothing."""
    for path in made.bundle.path("graphs").iterdir():
        graph = onnx.load(path).graph
        stated = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output]}
        assert set(stated) == {name for node in graph.node for name in node.output if name}
        assert 0 not in stated.values()
        bare = onnx.load(path)
        del bare.graph.value_info[:]
        inferred = onnx.shape_inference.infer_shapes(bare).graph.value_info
        assert inferred
        assert all(stated[value.name] == value.type.tensor_type.elem_type for value in inferred)


def test_forward_pass_does_not_need_the_gradient(made: Exported) -> None:
    """A device prunes the block graph to its forward pass."""
    for kind in made.bundle.manifest.kinds:
        graph = onnx.load(made.bundle.path(kind.graph)).graph
        needed = ancestors(graph, ["out"])
        assert "d_out" not in needed
        assert {f"w:{name}" for name in kind.weights if name.endswith("weight")} <= needed


def test_ranks_are_independent_symbols(made: Exported) -> None:
    """Every slot has a rank of its own, the same in A, B and their gradients."""
    for kind in made.bundle.manifest.kinds:
        graph = onnx.load(made.bundle.path(kind.graph)).graph
        shapes = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in [*graph.input, *graph.output]
        }
        ranks = set()
        for slot in kind.slots:
            rank = shapes[f"lora_a:{slot.name}"][0]
            assert isinstance(rank, str)
            assert shapes[f"lora_a:{slot.name}"] == [rank, slot.in_features]
            assert shapes[f"lora_b:{slot.name}"] == [slot.out_features, rank]
            ranks.add(rank)
        assert len(ranks) == len(kind.slots)


def test_grouped_heads_are_not_expanded(llama: Exported) -> None:
    """Keys and values of a group are read as they are."""
    graph = onnx.load(llama.bundle.path("graphs/block.onnx")).graph
    assert not any(node.op_type == "Expand" for node in graph.node)


def test_one_graph_serves_all_blocks(llama: Exported) -> None:
    """Three equal blocks are one kind, made once."""
    assert [block.kind for block in llama.bundle.manifest.blocks] == ["block"] * 3
    assert sum("made by" in line for line in llama.progress) == 1


def test_blocks_that_attend_differently_are_two_kinds(qwen2: Exported) -> None:
    """Same class and shapes, but one has a sliding window: told apart by the mask it reads."""
    kinds = qwen2.bundle.manifest.kinds
    assert [kind.shared[0] for kind in kinds] == ["mask", "mask.2"]
    assert {name for kind in kinds for name in kind.weights if name.endswith("bias")} == {
        f"self_attn.{name}_proj.bias" for name in "qkv"
    }


def test_tied_embedding_is_stored_once(llama: Exported, qwen2: Exported) -> None:
    """A tied output layer names the embedding; an untied one has its own weight."""
    tied, untied = llama.bundle.manifest.head, qwen2.bundle.manifest.head
    assert tied.weights == untied.weights == ("model.norm.weight",)
    assert tied.vocabulary is not None
    assert untied.vocabulary is not None
    assert tied.vocabulary.weights == ("model.embed_tokens.weight",)
    assert untied.vocabulary.weights == ("lm_head.weight",)
    assert "lm_head.weight" not in llama.bundle.weights()


def test_initial_adapter_changes_nothing_yet(bert: Exported) -> None:
    """B and the head's bias are zero, A and the head's weight are drawn."""
    adapter = bert.bundle.initial_adapter()
    assert adapter["classifier.weight"].shape == (len(LABELS), 32)
    assert np.std(adapter["classifier.weight"]) == pytest.approx(0.02, rel=0.3)
    assert not any(values.any() for name, values in adapter.items() if name.endswith(("lora_b", "bias")))
    assert all(values.any() for name, values in adapter.items() if name.endswith("lora_a"))
    assert bert.report.trainable == sum(values.size for values in adapter.values())


def test_manifest_says_what_devices_and_peft_need(bert: Exported, llama: Exported) -> None:
    """Labels, text frame, targets that leave the pooler alone, the chat form."""
    manifest = bert.bundle.manifest
    assert (manifest.labels, manifest.r_max, manifest.scale) == (LABELS, 6, 2.0)
    assert (manifest.text.prefix_ids, manifest.text.suffix_ids, manifest.text.max_tokens) == ((2,), (3,), 64)
    assert set(manifest.peft.target_modules) == {"query", "key", "value", "output.dense", "intermediate.dense"}
    assert manifest.peft.base_model == "bert"
    text = llama.bundle.manifest.text
    assert (text.prefix_ids, text.suffix_ids, text.max_tokens) == ((4,), (5,), 32)
    assert text.chat is not None
    assert text.chat.preamble == "<|system|>Default.<|end|>"


def test_tokenizer_neither_pads_nor_truncates(made: Exported) -> None:
    """The settings would be applied on every device."""
    tokenizer = json.loads(made.bundle.path("tokenizer.json").read_text(encoding="utf-8"))
    assert (tokenizer["padding"], tokenizer["truncation"]) == (None, None)


def test_same_graphs_whatever_the_depth_and_same_digest_for_the_same_seed(
    bert: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second trace, of a deeper model, gives the same graphs byte for byte; equal graphs and seed, equal bundles."""
    with quiet():
        export_models.bert(tmp_path / "deep", layers=5)
    deep = load(find_source(str(tmp_path / "deep")), "classify", len(LABELS)).model
    again = pipeline.trace_model(deep, pipeline.make_plan(bert.options), lambda line: None)
    for name, model in again.graphs.items():
        assert model.SerializeToString(deterministic=True) == bert.bundle.path(name).read_bytes()
    monkeypatch.setattr(pipeline, "trace_model", lambda *_: bert.traced)
    same = export_bundle(replace(bert.options, out=tmp_path / "same"))
    other = export_bundle(replace(bert.options, out=tmp_path / "other", seed=4))
    assert same.digest == bert.report.digest != other.digest


def test_verification_sees_a_wrong_weight(workshop: Path, bert: Exported) -> None:
    """One weight of the model is not the bundle's: some gradient is off and is named."""
    model = load(find_source(str(workshop / "bert")), "classify", len(LABELS)).model
    model.bert.encoder.layer[1].output.dense.weight.data[3, 5] += 0.5
    with pytest.raises(VerificationError, match="relative error: expected at most"):
        verify(bert.bundle, model, seed=0)


def test_failed_verification_leaves_nothing(
    traced_bert: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bundle and no leftovers beside its place."""
    monkeypatch.setattr("export.verify.TOLERANCE", 1e-12)
    with pytest.raises(ExportFailedError):
        export_bundle(replace(traced_bert.options, out=tmp_path / "bundle"))
    assert list(tmp_path.iterdir()) == []


def test_bundle_is_replaced_only_by_force(traced_bert: Exported, tmp_path: Path) -> None:
    """And what is no bundle is never replaced."""
    out = tmp_path / "bundle"
    shutil.copytree(traced_bert.bundle.folder, out)
    with pytest.raises(OutputError, match="exists already"):
        export_bundle(replace(traced_bert.options, out=out))
    report = export_bundle(replace(traced_bert.options, out=out, seed=99, force=True))
    assert open_bundle(out).digest == report.digest != traced_bert.report.digest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    (out / MANIFEST_NAME).unlink()
    with pytest.raises(OutputError, match="no bundle"):
        export_bundle(replace(traced_bert.options, out=out, force=True))


def test_impossible_settings_are_refused(workshop: Path, tmp_path: Path) -> None:
    """Before anything is traced, in one clear line."""
    options = ExportOptions(str(workshop / "bert"), "classify", tmp_path / "out", labels=LABELS)
    for changed, error, message in (
        ({"targets": ("query", "nonsense")}, TargetError, "nonsense: no such linear layer"),
        ({"targets": ()}, TargetError, "none given"),
        ({"rank": 0}, TargetError, "rank: expected 1 to 1024"),
        ({"alpha": -1.0}, TargetError, "alpha"),
        ({"labels": None}, DataError, "--labels"),
        ({"labels": ("one",)}, DataError, "two or more"),
        ({"task": "lm"}, DataError, "labels: belong to task classify"),
    ):
        with pytest.raises(error, match=message):
            export_bundle(replace(options, **changed))
    assert not (tmp_path / "out").exists()
