"""The block and embed graphs of a bundle: written from a template where the block's family has one, else traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from msgspec import structs

from edge_runtime.bundle import BlockKind, Embed
from export.blocks import Shared, Site, frozen_names, record_calls, shared_tensors
from export.clean import ancestors, clean
from export.errors import TraceError
from export.lora import LORA_A, LORA_B, SCALE, with_lora
from export.templates import find_template
from export.tracing import BATCH, D_HIDDEN, D_OUT, HIDDEN, OUT, SEQ, SIZES, Input, trace

_FACTORS = {LORA_A: {0: "rank"}, LORA_B: {1: "rank"}, SCALE: {}}


@dataclass(frozen=True)
class BlockGraph:
    """One kind's entry in the manifest, its ONNX model, and who made it: "llama template", "tracer".

    ``long`` is its model for long sequences, where it has one.
    """

    entry: BlockKind
    model: Any
    maker: str
    long: Any = None

    @property
    def models(self) -> dict[str, Any]:
        """Its models by file name."""
        return {self.entry.graph: self.model} | ({self.entry.long: self.long} if self.entry.long else {})


def block_graph(site: Site, shared: dict[str, Shared], width: int, name: str) -> BlockGraph:
    """Make one block's joint forward and backward pass.

    Args:
        site: The block; all blocks of its kind get this graph.
        shared: Every tensor shared by the model's blocks.
        width: Size of the hidden state.
        name: The kind's name, used for the file too.

    Raises:
        TraceError: the graph cannot be made, or its output depends on ``d_out``.
    """
    template = find_template(site, shared)
    block, tensors, inputs = _block_inputs(site, shared, width)
    inputs.append(_hidden_input(D_OUT, width))
    outputs = [OUT, D_HIDDEN]
    outputs += [f"d_{factor}:{slot.name}" for slot in site.slots for factor in (LORA_A, LORA_B)]
    if template is not None:
        model, maker = template.build(inputs, outputs), f"{template.family} template"
    else:
        model, maker = clean(trace(_joint(block, site, list(tensors)), inputs, outputs)), "tracer"
    if D_OUT in ancestors(model.graph, [OUT]):
        raise TraceError(f"block {site.prefix}: the forward pass depends on {D_OUT}")
    entry = _entry(name, site, list(tensors), model)
    if template is None or template.long is None:
        return BlockGraph(entry, model, maker)
    long = replace(template, body=template.long).build(inputs, outputs)
    return BlockGraph(structs.replace(entry, long=f"graphs/{name}.long.onnx"), model, maker, long)


def forward_graph(site: Site, shared: dict[str, Shared], width: int, name: str) -> BlockGraph:
    """Trace one block's forward pass, in operators that other tools can differentiate; else as :func:`block_graph`.

    Raises:
        TraceError: the graph cannot be made.
    """
    block, tensors, inputs = _block_inputs(site, shared, width)

    def forward(hidden: Any, *values: Any) -> tuple[Any]:
        given = dict(zip(site.call.shared, values, strict=False))
        args, kwargs = site.call.arguments(hidden, given)
        weights = dict(zip(tensors, values[len(site.call.shared) :], strict=True))
        with torch.no_grad():
            out = torch.func.functional_call(block, weights, args, kwargs)
        return (out[0] if isinstance(out, tuple) else out,)

    model = clean(trace(forward, inputs, [OUT]))
    return BlockGraph(_entry(name, site, list(tensors), model), model, "tracer")


def _entry(name: str, site: Site, paths: Sequence[str], model: Any) -> BlockKind:
    kept = {value.name for value in model.graph.input}
    return BlockKind(
        name=name,
        graph=f"graphs/{name}.onnx",
        weights=tuple(path for path in paths if f"w:{path}" in kept),
        slots=site.slots,
        shared=tuple(key for key in site.call.shared if key in kept),
    )


def _block_inputs(site: Site, shared: dict[str, Shared], width: int) -> tuple[Any, dict[str, Any], list[Input]]:
    """The block with LoRA, its tensors by path, and graph inputs: the hidden state, the shared tensors, the tensors."""
    block = with_lora(site.module, site.slots)
    tensors = dict([*block.named_parameters(), *block.named_buffers()])
    inputs = [_hidden_input(HIDDEN, width)]
    inputs += [Input(key, shared[key].example, shared[key].dims) for key in site.call.shared]
    inputs += [_tensor_input(path, tensors, site) for path in tensors]
    return block, tensors, inputs


def _hidden_input(name: str, width: int) -> Input:
    return Input(name, torch.randn(SIZES[BATCH], SIZES[SEQ], width), {0: BATCH, 1: SEQ})


def _tensor_input(path: str, tensors: dict[str, Any], site: Site) -> Input:
    slot, _, leaf = path.rpartition(".")
    for number, item in enumerate(site.slots):
        if item.name == slot and leaf in _FACTORS:
            return Input(f"{leaf}:{slot}", tensors[path], {axis: f"rank{number}" for axis in _FACTORS[leaf]})
    return Input(f"w:{path}", tensors[path])


def _joint(block: Any, site: Site, paths: Sequence[str]) -> Callable[..., tuple[Any, ...]]:
    """The function (hidden, shared…, tensors…, d_out) -> (out, d_hidden, factor gradients…)."""
    wanted = [f"{slot.name}.{factor}" for slot in site.slots for factor in (LORA_A, LORA_B)]

    def joint(hidden: Any, *rest: Any) -> tuple[Any, ...]:
        *values, d_out = rest
        given = dict(zip(site.call.shared, values, strict=False))
        tensors = dict(zip(paths, values[len(site.call.shared) :], strict=True))
        hidden = hidden.detach().requires_grad_()
        for path in wanted:
            tensors[path] = tensors[path].detach().requires_grad_()
        with torch.enable_grad():
            args, kwargs = site.call.arguments(hidden, given)
            out = torch.func.functional_call(block, tensors, args, kwargs)
            out = out[0] if isinstance(out, tuple) else out
        grads = torch.autograd.grad(out, [hidden, *(tensors[path] for path in wanted)], d_out)
        return out.detach(), *grads

    return joint


def embed_graph(model: Any, wanted: Sequence[str]) -> tuple[Embed, Any]:
    """Trace everything before the blocks: the first hidden state and the shared tensors ``wanted``.

    Raises:
        TraceError: the part cannot be traced.
    """
    names = frozen_names(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])

    def embed(ids: Any, mask: Any, *values: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            seen = record_calls(model, ids, mask, dict(zip(names, values, strict=True)))
            shared, _ = shared_tensors(seen)
        return seen[0][0][0], *(shared[name] for name in wanted)

    dims = {0: BATCH, 1: SEQ}
    ones = torch.ones(SIZES[BATCH], SIZES[SEQ], dtype=torch.int64)
    inputs = [Input("input_ids", ones, dims), Input("attention_mask", ones.clone(), dims)]
    inputs += [Input(f"w:{name}", tensors[name]) for name in names]
    graph = clean(trace(embed, inputs, [HIDDEN, *wanted]))
    kept = {value.name for value in graph.graph.input}
    weights = tuple(name for name in names if f"w:{name}" in kept)
    return Embed(graph="graphs/embed.onnx", weights=weights, shared=tuple(wanted)), graph
