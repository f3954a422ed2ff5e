"""Blocks written from templates: used where they fit, equal to the traced graph, and cut as a device cuts them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import export_models
import numpy as np
import onnx
import pytest
import torch
from export_sessions import LABELS, Exported
from msgspec import structs
from transformers import AutoConfig

from edge_runtime.bundle import BlockKind
from edge_runtime.engine.graph import JointGraph
from export import ExportOptions, graphs, pipeline
from export.attention import traceable_attention
from export.blocks import Shared, Site, study
from export.fast import fast_form
from export.quiet import quiet
from export.runner import open_session
from export.sources import find_source, load
from export.templates import find_template

Arrays = dict[str, np.ndarray]
FAMILIES = ("bert", "llama", "qwen2")
MOST_NODES = {"bert": 150, "llama": 180, "qwen2": 190}
TASKS = {"bert": "classify", "llama": "lm", "qwen2": "lm"}


@dataclass(frozen=True)
class Pair:
    """The last block of a model, by template and by tracer, every linear layer with a LoRA pair."""

    family: str
    site: Site
    model: onnx.ModelProto  # by template
    written: JointGraph
    traced: JointGraph
    long: JointGraph | None
    entry: BlockKind


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, workshop: Path) -> Pair:
    """Qwen2's last block has a sliding window, and differs from Llama's by biases."""
    with blocks(workshop / request.param, TASKS[request.param]) as (sites, shared, width):
        made = [graphs.block_graph(sites[-1], shared, width, "block")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "find_template", lambda *_: None)
            made.append(graphs.block_graph(sites[-1], shared, width, "block"))
    assert [graph.maker.split()[-1] for graph in made] == ["template", "tracer"]
    assert structs.replace(made[0].entry, long=None) == made[1].entry
    cut = (JointGraph(graph.model.SerializeToString(), name="block") for graph in made)
    long = JointGraph(made[0].long.SerializeToString(), name="block.long") if made[0].long else None
    return Pair(request.param, sites[-1], made[0].model, *cut, long, made[0].entry)


class blocks:  # noqa: N801 - reads as a function
    """A context with a model's (sites, shared tensors, width), ready to be traced."""

    def __init__(self, folder: Path, task: Any, rank: int = 6) -> None:
        labels = LABELS if task == "classify" else None
        plan = pipeline.make_plan(ExportOptions(str(folder), task, folder / "out", rank=rank, labels=labels))
        self.model, self.plan = load(find_source(plan.base), plan.task, len(plan.labels)).model, plan
        self.attention = traceable_attention(self.model)

    def __enter__(self) -> tuple[tuple[Site, ...], dict[str, Shared], int]:
        self.attention.__enter__()
        shared, calls = study(self.model)
        return pipeline.find_sites(self.model, calls, self.plan), shared, self.model.config.hidden_size

    def __exit__(self, *error: Any) -> None:
        self.attention.__exit__(*error)


def feeds(pair: Pair, batch: int, seq: int, *, padded: int = 0) -> Arrays:
    """Random inputs, a rank of its own for every slot, the last ``padded`` positions of the first example masked."""
    rng = np.random.default_rng(batch * 100 + seq)
    sizes = {"batch": batch, "seq": seq, **{f"rank{number}": 1 + number % 5 for number in range(len(pair.site.slots))}}
    found: Arrays = {}
    for value in pair.model.graph.input:
        name, dims = value.name, value.type.tensor_type.shape.dim
        shape = [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in dims]
        found[name] = rng.normal(0.0, 0.3, shape).astype(np.float32)
        if name.startswith("mask"):
            allowed = (
                np.ones(shape, bool) if shape[2] != seq else np.broadcast_to(np.tri(seq, dtype=bool), shape).copy()
            )
            allowed[0, ..., seq - padded :] = False
            found[name] = np.where(allowed, 0.0, np.finfo(np.float32).min).astype(np.float32)
        if name.startswith("position_embeddings"):
            found[name][..., shape[-1] // 2 :] = found[name][..., : shape[-1] // 2]
    return found


def run(graph: JointGraph, outputs: list[str], given: Arrays, kept: tuple[str, ...] = ()) -> Arrays:
    """The outputs of the part of the graph that makes them."""
    session = open_session(graph.derive(outputs, kept).SerializeToString())
    read = {value.name: given[value.name] for value in session.get_inputs()}
    return dict(zip(outputs, session.run(outputs, read), strict=True))


def products(graph: JointGraph, outputs: list[str], kept: tuple[str, ...] = ()) -> int:
    """How many matrix products the outputs need beside what is kept."""
    return sum(node.op_type in {"Gemm", "MatMul", "FusedMatMul"} for node in graph.derive(outputs, kept).graph.node)


def assert_close(found: Arrays, wanted: Arrays) -> None:
    """‖x - x*‖ / ‖x*‖ of every tensor is at most 1e-5."""
    for name, value in wanted.items():
        floor = 1e-6 * max(float(np.linalg.norm(other)) for other in wanted.values())
        error = float(np.linalg.norm(found[name] - value)) / max(float(np.linalg.norm(value)), floor)
        assert error <= 1e-5, (name, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_template_is_used_and_exact(family: str, request: pytest.FixtureRequest) -> None:
    """The report says who made a graph; every gradient of the whole model is autograd's to 1e-5."""
    made: Exported = request.getfixturevalue(family)
    name = "bert" if family == "bert" else "llama"
    assert set(made.report.makers.values()) == {f"{name} template"}
    assert set(made.report.makers) == {kind.graph for kind in made.bundle.manifest.kinds}
    assert all(made.report.nodes[graph] <= MOST_NODES[family] for graph in made.report.makers)
    assert any(f"made by the {name} template" in line for line in made.progress)
    assert made.report.max_rel_err <= 1e-5


@pytest.mark.parametrize(("batch", "seq", "padded"), [(3, 7, 0), (2, 12, 4), (1, 1, 0), (2, 1, 0), (4, 2, 1)])
def test_template_equals_trace(pair: Pair, batch: int, seq: int, padded: int) -> None:
    """All outputs, mixed ranks, padding, sequences down to one token, and sizes equal to the number of heads."""
    given, outputs = feeds(pair, batch, seq, padded=padded), list(pair.written.outputs)
    found = run(pair.written, outputs, given)
    assert all(np.isfinite(value).all() for value in found.values())
    if seq == 1:  # a softmax over one position has no gradient: both sides hold only rounding
        outputs = [name for name in outputs if not any(word in name for word in ("query", "key", "q_proj", "k_proj"))]
    assert_close({name: found[name] for name in outputs}, run(pair.traced, outputs, given))


@pytest.mark.parametrize(("batch", "seq", "padded"), [(1, 8, 0), (2, 13, 4), (3, 23, 22)])
def test_long_form_equals_trace(pair: Pair, batch: int, seq: int, padded: int) -> None:
    """Queries in chunks, of lengths that four does and does not divide; only a causal mask allows them."""
    if pair.long is None:
        assert pair.family == "bert"
        return
    given, outputs = feeds(pair, batch, seq, padded=padded), list(pair.written.outputs)
    assert pair.long.outputs.keys() == pair.written.outputs.keys()
    assert_close(run(pair.long, outputs, given), run(pair.traced, outputs, given))
    gradients = [name for name in outputs if name != "out"]
    kept = pair.long.boundary(["out"], gradients)
    forward = run(pair.long, list(dict.fromkeys(["out", *kept])), given)
    assert_close(run(pair.long, gradients, {**given, **forward}, kept), run(pair.long, gradients, given))


def test_long_form_keeps_fewer_probabilities(pair: Pair) -> None:
    """Of four chunks' 5/8 are left, and nothing else of what is kept is more."""
    if pair.long is None:
        assert pair.family == "bert"
        return
    given = feeds(pair, 1, 64)
    found = []
    for graph in (pair.written, pair.long):
        kept = graph.boundary(["out"], [name for name in graph.outputs if name != "out"])
        made = run(graph, list(dict.fromkeys(["out", *kept])), given).values()
        squares = [value.size for value in made if value.ndim == 4 and value.shape[-1] % 16 == 0 < value.shape[-1] > 8]
        found.append((sum(squares), sum(value.nbytes for value in made)))
    (whole, bytes_whole), (cut, bytes_cut) = found
    assert cut == whole * 5 // 8
    assert bytes_whole - bytes_cut == 4 * (whole - cut)


def test_a_mask_that_shows_the_future_has_no_long_form(workshop: Path) -> None:
    """Otherwise chunks would leave out what queries may see."""
    with blocks(workshop / "llama", "lm") as (sites, shared, _):
        name = next(name for name in shared if name.startswith("mask"))
        wide = {**shared, name: replace(shared[name], example=torch.zeros_like(shared[name].example))}
        causal, open_ = find_template(sites[0], shared), find_template(sites[0], wide)
    assert causal is not None
    assert causal.long is not None
    assert open_ is not None
    assert open_.long is None


def test_fast_form_scales_rows_of_decoders_one_by_one(pair: Pair) -> None:
    """A token with massive activations must not set the scale of the others; a layer norm's rows need no scaling."""
    fast, _ = fast_form(pair.model, pair.entry.weights)
    makers = {name: node.op_type for node in fast.graph.node for name in node.output}
    read = {makers[node.input[0]] for node in fast.graph.node if node.op_type == "DynamicQuantizeMatMul"}
    assert read == ({"Div", "LayerNormalization"} if pair.family == "bert" else {"Div"})


def test_an_example_of_padding_only_gives_numbers(pair: Pair) -> None:
    """A row that may attend to nothing attends to everything, as in the traced graph."""
    given, outputs = feeds(pair, 2, 5, padded=5), list(pair.written.outputs)
    found = run(pair.written, outputs, given)
    assert all(np.isfinite(value).all() for value in found.values())
    assert_close(found, run(pair.traced, outputs, given))


def test_template_is_smaller(pair: Pair) -> None:
    """Fewer than two thirds of the nodes, no products or transposes of weights added."""
    outputs = list(pair.written.outputs)
    assert pair.written.node_count(outputs) < 2 / 3 * pair.traced.node_count(outputs)
    assert products(pair.written, outputs) <= products(pair.traced, outputs)
    kinds = {node.op_type for node in pair.written.model.graph.node}
    assert not kinds & {"Pow", "Expand", "Cast", "Where"}
    turned = [node.input[0] for node in pair.written.model.graph.node if node.op_type == "Transpose"]
    assert not any(name.startswith(("w:", "lora_")) for name in turned)


def test_forward_pass_reads_no_gradient(pair: Pair) -> None:
    """Nor anything that only the backward pass needs."""
    model = pair.written.derive(["out"])
    assert "d_out" not in {value.name for value in model.graph.input}
    assert products(pair.written, ["out"]) == 2 + 3 * len(pair.site.slots)


def test_kept_activations_give_the_same_gradients(pair: Pair) -> None:
    """Every value that crosses from forward to backward has an element type, and fewer bytes cross than traced."""
    gradients = [name for name in pair.written.outputs if name != "out"]
    given = feeds(pair, 2, 9, padded=3)
    crossing = {}
    for word, graph in (("written", pair.written), ("traced", pair.traced)):
        kept = graph.boundary(["out"], gradients)
        forward = run(graph, list(dict.fromkeys(["out", *kept])), given)
        crossing[word] = sum(forward[name].nbytes for name in kept)
        assert_close(run(graph, gradients, {**given, **forward}, kept), run(graph, gradients, given))
    assert crossing["written"] < crossing["traced"]


def test_dead_factor_drops_its_products(pair: Pair) -> None:
    """A factor's gradient is one product; what one factor alone needs is one product beside what is kept."""
    gradients = [name for name in pair.written.outputs if name != "out"]
    kept = pair.written.boundary(["out"], gradients)
    everything = products(pair.written, gradients, kept)
    for slot in pair.site.slots:
        for factor in "ab":
            rest = [name for name in gradients if name != f"d_lora_{factor}:{slot.name}"]
            assert products(pair.written, rest, kept) == everything - 1
    alone = [f"d_lora_b:{pair.site.slots[-1].name}"]
    assert products(pair.written, alone, pair.written.boundary(["out"], alone)) == 1


def changed_model(workshop: Path, folder: Path, family: str, **settings: Any) -> Path:
    """A copy of a tiny model's configuration with other settings, random weights."""
    with quiet():
        getattr(export_models, family)(folder)
        config = AutoConfig.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **settings}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("family", "settings"),
    [("bert", {"hidden_act": "relu"}), ("bert", {"hidden_act": "gelu_new"}), ("llama", {"hidden_act": "gelu"})],
)
def test_other_settings_are_left_to_the_tracer(
    workshop: Path, tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    """An activation the template does not compute."""
    changed = changed_model(workshop, tmp_path / family, family, **settings)
    with blocks(changed, TASKS[family]) as (sites, shared, _):
        assert [find_template(site, shared) for site in sites] == [None] * len(sites)


def test_an_unknown_parameter_or_argument_is_left_to_the_tracer(workshop: Path) -> None:
    """What a template does not read it must not ignore."""
    with blocks(workshop / "llama", "lm") as (sites, shared, _):
        site = sites[0]
        assert find_template(site, shared) is not None
        lacking = {**shared, "mask": replace(shared["mask"], dims={0: "batch"})}
        assert find_template(site, lacking) is None
        site.module.extra = site.module.input_layernorm.weight.__class__(site.module.input_layernorm.weight.data)
        assert find_template(site, shared) is None


def test_traced_fallback_still_exports(workshop: Path, tmp_path: Path) -> None:
    """A BERT with another activation is traced, and the report says so."""
    changed = changed_model(workshop, tmp_path / "bert", "bert", hidden_act="relu")
    with blocks(changed, "classify") as (sites, shared, width):
        assert graphs.block_graph(sites[0], shared, width, "block").maker == "tracer"
