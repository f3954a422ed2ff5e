"""An export from beginning to end: load, trace, write, verify."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs

from edge_runtime.bundle import (
    SCHEMA,
    Array,
    Base,
    Block,
    Bundle,
    BundleError,
    Embed,
    FastForm,
    Head,
    Manifest,
    Module,
    PeftInfo,
    Task,
    open_bundle,
)
from export.adapters import PeftAdapter, initial_adapter, read_adapter
from export.attention import traceable_attention
from export.blocks import Shared, Site, find_blocks, signature, study
from export.errors import AdapterError, DataError, ExportFailedError, ModelError, OutputError, TargetError
from export.fast import fast_form
from export.graphs import BlockGraph, block_graph, embed_graph
from export.heads import find_head, head_graphs
from export.lora import check_targets, find_slots, peft_targets
from export.lowbit import lower, with_scales
from export.options import ALL_LINEAR, ExportOptions, ExportReport, VerifiedCase
from export.records import check_labels
from export.sources import ADAPTER_CONFIG, Loaded, find_source, load
from export.storage import restored, storage_of, stored
from export.text import plain_tokenizer, text_info
from export.verify import verify, verify_fast
from export.writer import Contents, check_place, staged, write_bundle

MAX_RANK = 1024
DEFAULT_RANK = 16
_TOOLS = ("torch", "transformers", "onnx", "onnxscript")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is exported, with every default filled in."""

    task: Task
    rank: int
    scale: float  # alpha / rank
    labels: tuple[str, ...]
    targets: tuple[str, ...]
    given: PeftAdapter | None
    base: str  # preset or folder of the base model
    storage: Base  # of frozen matrices


@dataclass(frozen=True)
class Traced:
    """The graphs of a model with their manifest entries."""

    sites: tuple[Site, ...]
    kinds: tuple[BlockGraph, ...]
    embed: Embed
    head: Head
    graphs: dict[str, Any]  # file name -> ONNX model


def run(options: ExportOptions, progress: Progress) -> ExportReport:
    """Make one bundle.

    Args:
        options: What to export and where to.
        progress: Called with one line at each step.

    Raises:
        ExportError: see :mod:`export.errors`; nothing is left at ``options.out`` then.
    """
    began = time.monotonic()
    check_place(options.out, force=options.force)
    plan = make_plan(options)
    source = find_source(plan.base)
    progress(f"loading {source.name}")
    loaded = load(source, plan.task, len(plan.labels))
    traced = trace_model(loaded.model, plan, progress)
    contents = bundle_contents(loaded, plan, traced, options)
    with staged(options.out) as folder:
        progress("writing")
        bundle = _write(folder, contents)
        progress("verifying against autograd")
        _use_stored(loaded.model, contents.weights)
        cases = verify(bundle, loaded.model, seed=options.seed)
        fast = verify_fast(bundle, seed=options.seed)
        report = bundle_report(bundle, contents, cases, options.out)
    progress(f"verified: worst relative error {report.max_rel_err:.1e}")
    makers = {kind.entry.graph: kind.maker for kind in traced.kinds}
    return replace(report, fast_rel_err=fast, makers=makers, export_s=round(time.monotonic() - began, 2))


def _write(folder: Path, contents: Contents) -> Bundle:
    try:
        write_bundle(folder, contents)
        return open_bundle(folder)
    except OSError as error:
        raise OutputError(f"the bundle cannot be written: {error}") from error
    except BundleError as error:
        raise ExportFailedError(f"the bundle as written cannot be opened: {error}") from error


def make_plan(options: ExportOptions) -> Plan:
    """Fill in defaults, from the peft folder where one is given.

    Raises:
        ExportInputError: a setting is out of range, missing, or given twice.
    """
    given = read_adapter(Path(options.model)) if (Path(options.model) / ADAPTER_CONFIG).is_file() else None
    if given is not None and (options.rank, options.alpha, options.targets) != (None, None, None):
        raise AdapterError(f"adapter {options.model}: it sets rank, alpha and targets itself: leave these options out")
    rank = given.rank if given is not None else DEFAULT_RANK if options.rank is None else options.rank
    if not 0 < rank <= MAX_RANK:
        raise TargetError(f"rank: expected 1 to {MAX_RANK}, got {rank}")
    if options.engine != "blocks" and options.base != "fp32":
        raise TargetError(f"base: the engine {options.engine} has fp32 only, got {options.base}")
    alpha = 2.0 * rank if options.alpha is None else options.alpha
    if not 0 < alpha < float("inf"):
        raise TargetError(f"alpha: expected a positive number, got {alpha}")
    return Plan(
        task=options.task,
        rank=rank,
        scale=given.scale if given is not None else alpha / rank,
        labels=_labels(options, given),
        targets=(ALL_LINEAR,) if options.targets is None else options.targets,
        given=given,
        base=given.base if given is not None else options.model,
        storage=options.base,
    )


def _labels(options: ExportOptions, given: PeftAdapter | None) -> tuple[str, ...]:
    if options.task == "lm":
        if options.labels:
            raise DataError("labels: belong to task classify, not to lm")
        return ()
    labels = options.labels if options.labels is not None else given.labels if given is not None else None
    if labels is None:
        raise DataError("labels: task classify needs --labels or --labels-from")
    return check_labels(labels, what="labels")


def trace_model(model: Any, plan: Plan, progress: Progress) -> Traced:
    """Trace every distinct kind of block once, then what stands before and after the blocks.

    Raises:
        ModelError: blocks or head are not of a known form.
        TargetError: a target is no linear layer of the blocks.
        TraceError: a graph cannot be made.
    """
    find_head(model, plan.task)  # refuse early
    width = model.config.hidden_size
    with traceable_attention(model):
        shared, calls = study(model)
        sites = find_sites(model, calls, plan)
        kinds = _make_kinds(sites, shared, width, progress)
        progress("tracing embedding and head")
        used = [name for name in shared if any(name in kind.entry.shared for kind in kinds)]
        embed, embed_model = embed_graph(model, used)
        head = head_graphs(model, plan.task, width)
    graphs = {name: graph for kind in kinds for name, graph in kind.models.items()}
    graphs |= {embed.graph: embed_model, **head.models}
    return Traced(sites, kinds, embed, head.entry, graphs)


def find_sites(model: Any, calls: Sequence[Any], plan: Plan) -> tuple[Site, ...]:
    """Every block with its slots and the number of its kind.

    Raises:
        TargetError: a target names nothing.
        AdapterError: the given adapter has modules outside the blocks' linear layers.
    """
    path, blocks = find_blocks(model)
    if plan.given is None:
        check_targets(blocks, plan.targets)
    known: dict[Any, int] = {}
    sites = []
    for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        prefix = f"{path}.{index}"
        slots = find_slots(block, plan.targets)
        if plan.given is not None:
            slots = tuple(slot for slot in slots if f"{prefix}.{slot.name}" in plan.given.factors)
        kind = known.setdefault(signature(block, call, slots), len(known))
        sites.append(Site(prefix, block, call, slots, kind))
    if plan.given is not None:
        stray = set(plan.given.factors) - {f"{site.prefix}.{slot.name}" for site in sites for slot in site.slots}
        if stray:
            raise AdapterError(f"adapter: {min(stray)}: not a linear layer inside the model's blocks")
    return tuple(sites)


def _make_kinds(
    sites: Sequence[Site], shared: dict[str, Shared], width: int, progress: Progress
) -> tuple[BlockGraph, ...]:
    kinds: list[BlockGraph] = []
    for site in sites:
        if site.kind == len(kinds):
            made = block_graph(site, shared, width, f"block{site.kind or ''}")
            number = f"kind {site.kind + 1} of {max(other.kind for other in sites) + 1}"
            progress(f"{site.prefix}: {number} made by the {made.maker}")
            kinds.append(made)
    return tuple(kinds)


def bundle_contents(loaded: Loaded, plan: Plan, traced: Traced, options: ExportOptions) -> Contents:
    """Everything that goes into the bundle, the manifest saying so.

    Raises:
        ModelError: a weight cannot be expressed.
    """
    model = loaded.model
    weights = _weights(model, traced, plan.storage)
    if options.engine == "blocks":
        traced = _lowered(traced, model, plan.storage)
    modules = tuple(
        Module(f"{site.prefix}.{slot.name}", index, slot.name, slot.in_features, slot.out_features)
        for index, site in enumerate(traced.sites)
        for slot in site.slots
    )
    task_type = "SEQ_CLS" if plan.task == "classify" else "CAUSAL_LM"
    manifest = Manifest(
        schema=SCHEMA,
        model=loaded.source.name,
        task=plan.task,
        width=model.config.hidden_size,
        base=plan.storage,
        embed=traced.embed,
        kinds=tuple(kind.entry for kind in traced.kinds),
        blocks=tuple(Block(kind=traced.kinds[site.kind].entry.name, prefix=site.prefix) for site in traced.sites),
        head=traced.head,
        modules=modules,
        r_max=plan.rank,
        scale=plan.scale,
        text=text_info(loaded.tokenizer, model.config, plan.task, options.max_tokens),
        peft=PeftInfo(loaded.source.name, task_type, peft_targets(model, [module.name for module in modules])),  # type: ignore[arg-type] # the two literals
        parameters=sum(value.numel() for value in model.parameters()),
        files={},
        labels=plan.labels,
        tool_versions={name: version(name) for name in _TOOLS},
    )
    return Contents(
        manifest=manifest,
        graphs=traced.graphs,
        weights=weights,
        adapter=initial_adapter(modules, traced.head, rank=plan.rank, seed=options.seed, given=plan.given),
        tokenizer=plain_tokenizer(loaded.tokenizer).to_str(pretty=False),
    )


def _weights(model: Any, traced: Traced, base: Base) -> dict[str, Array]:
    """Every frozen tensor as it is stored."""
    wanted = [*traced.embed.weights, *traced.head.weights]
    wanted += traced.head.vocabulary.weights if traced.head.vocabulary else ()
    for site in traced.sites:
        wanted += [f"{site.prefix}.{name}" for name in traced.kinds[site.kind].entry.weights]
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ModelError(f"model: weights {missing[:3]} are shared between blocks, which a bundle cannot express")
    weights: dict[str, Array] = {}
    for name in dict.fromkeys(wanted):
        weights |= stored(name, tensors[name].detach().numpy(), base)
    return weights


def _lowered(traced: Traced, model: Any, base: Base) -> Traced:
    """Graphs and entries that read the weights as they are stored; the graphs are edited in place."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])

    def lowered(graph: Any, names: tuple[str, ...], prefix: str = "", *, once: bool = False) -> tuple[str, ...]:
        storages = {f"w:{name}": storage_of(tuple(tensors[prefix + name].shape), base) for name in names}
        lower(graph, storages, once=once)
        return with_scales(names, storages)

    kinds, graphs = [], dict(traced.graphs)
    for number, kind in enumerate(traced.kinds):
        prefix = next(site.prefix for site in traced.sites if site.kind == number)
        fast = None
        if base != "int4":  # its product would need the restored weight quantised again
            fast_names = {}
            for name, graph in kind.models.items():
                fast_names[name] = name.replace(kind.entry.name, f"{kind.entry.name}.fast")
                graphs[fast_names[name]], quantised = fast_form(graph, kind.entry.weights)
            fast = FastForm(fast_names[kind.entry.graph], quantised, fast_names.get(kind.entry.long or ""))
        for graph in kind.models.values():
            names = lowered(graph, kind.entry.weights, f"{prefix}.")
        kinds.append(replace(kind, entry=structs.replace(kind.entry, weights=names, fast=fast)))
    embed, head = traced.embed, traced.head
    vocabulary = head.vocabulary
    if vocabulary is not None:
        names = lowered(graphs[vocabulary.graph], vocabulary.weights, once=True)
        vocabulary = structs.replace(vocabulary, weights=names)
    head = structs.replace(head, weights=lowered(graphs[head.graph], head.weights), vocabulary=vocabulary)
    embed = structs.replace(embed, weights=lowered(graphs[embed.graph], embed.weights))
    return replace(traced, kinds=tuple(kinds), embed=embed, head=head, graphs=graphs)


def _use_stored(model: Any, weights: Mapping[str, Array]) -> None:
    """Give the model the weights that devices will compute with, so that verification judges the graphs alone."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in weights and weights[name].dtype != np.float32:
                tensor.copy_(torch.from_numpy(restored(name, weights)))


def bundle_report(bundle: Bundle, contents: Contents, cases: tuple[VerifiedCase, ...], out: Path) -> ExportReport:
    """What was made, but for the time it took."""
    manifest = bundle.manifest
    size = sum(path.stat().st_size for path in bundle.folder.rglob("*") if path.is_file())
    return ExportReport(
        bundle=str(out),
        digest=bundle.digest,
        bytes=size,
        modules=len(manifest.modules),
        parameters=manifest.parameters,
        trainable=sum(int(values.size) for values in contents.adapter.values()),
        export_s=0.0,
        nodes={name: len(model.graph.node) for name, model in contents.graphs.items()},
        cases=cases,
    )
