"""Which template fits a block: only one that is known to compute exactly what the block's own code does.

Whatever is not recognised (another class, activation, mask form, an additional parameter) goes to the tracer.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation, SiLUActivation
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from export.blocks import Shared, Site
from export.templates.attention import Attention, Rotary
from export.templates.bert import bert_template
from export.templates.frame import Template
from export.templates.llama import llama_template
from export.tracing import BATCH, SEQ

# Arguments of a block that change nothing once mask and tables are given.
_CHUNKS = 4  # of the queries of long sequences; 8 were no faster at 512 tokens
_IGNORED = frozenset({"self", "position_ids", "cache_position", "use_cache"})


def find_template(site: Site, shared: Mapping[str, Shared]) -> Template | None:
    """The template that writes this block, or None when it has to be traced."""
    arguments = _arguments(site)
    mask = _mask(arguments.pop("attention_mask", None), shared)
    if mask is None:
        return None
    block, slots = site.module, {slot.name for slot in site.slots}
    tables = arguments.pop("position_embeddings", None)
    template = None
    if _meaningful(arguments):
        return None
    if type(block) in (LlamaDecoderLayer, Qwen2DecoderLayer):
        rotary = _rotary(tables, shared, block.self_attn.head_dim)
        if rotary is not None and isinstance(block.mlp.act_fn, (nn.SiLU, SiLUActivation)):
            attention = _grouped(block.self_attn, mask, rotary)
            template = llama_template(block, slots, attention)
            if mask.causal:
                long = llama_template(block, slots, replace(attention, chunks=_CHUNKS))
                template = replace(template, long=long.body)
    elif type(block) is BertLayer and tables is None and _plain_bert(block):
        template = bert_template(block, slots, _bert_attention(block.attention.self, mask))
    return template if template is not None and _same_weights(block, template) else None


@dataclass(frozen=True)
class _Mask:
    name: str
    square: bool  # (batch, 1, seq, seq), else (batch, 1, 1, seq)
    causal: bool  # closes every later position


def _arguments(site: Site) -> dict[str, Any]:
    """What the block is called with by parameter name, the names of shared tensors standing for them."""
    args, kwargs = site.call.arguments(None, {name: name for name in site.call.shared})
    bound = inspect.signature(type(site.module).forward).bind(site.module, *args, **kwargs).arguments
    extra = bound.pop("kwargs", {})
    return {**bound, **extra}


def _meaningful(arguments: Mapping[str, Any]) -> list[str]:
    """Arguments that a template would have to know what to do with."""
    return [name for name, value in arguments.items() if name not in _IGNORED and value not in (None, False)]


def _mask(name: Any, shared: Mapping[str, Shared]) -> _Mask | None:
    if not isinstance(name, str):
        return None
    item = shared[name]
    fixed = {size for axis, size in enumerate(item.example.shape) if axis not in item.dims}
    forms = {True: {0: BATCH, 2: SEQ, 3: SEQ}, False: {0: BATCH, 3: SEQ}}
    found = [square for square, dims in forms.items() if item.dims == dims]
    if not found or item.example.dim() != 4 or fixed != {1}:
        return None
    return _Mask(name, found[0], causal=found[0] and _is_causal(item.example))


def _is_causal(mask: Any) -> bool:
    later = torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1)
    return bool((mask[..., later] == torch.finfo(mask.dtype).min).all())


def _rotary(names: Any, shared: Mapping[str, Shared], dim: int) -> Rotary | None:
    """Tables (1, seq, dim) for all dimensions of a head, the same for every example, with two equal halves."""
    if not isinstance(names, (tuple, list)) or len(names) != 2:
        return None
    for name in names:
        item = shared[name]
        if item.dims != {1: SEQ} or (item.example.dim(), item.example.shape[0], item.example.shape[-1]) != (3, 1, dim):
            return None
        if not item.example[..., : dim // 2].equal(item.example[..., dim // 2 :]):
            return None
    return Rotary(*names)


def _grouped(attention: Any, mask: _Mask, rotary: Rotary) -> Attention:
    dim = int(attention.head_dim)
    heads, groups = (layer.out_features // dim for layer in (attention.q_proj, attention.k_proj))
    return Attention(heads, groups, dim, float(attention.scaling), mask.name, mask.square, rotary)


def _bert_attention(attention: Any, mask: _Mask) -> Attention:
    heads = int(attention.num_attention_heads)
    dim = int(attention.attention_head_size)
    return Attention(heads, heads, dim, float(attention.scaling), mask.name, mask.square)


def _plain_bert(block: Any) -> bool:
    config = block.attention.self.config
    absolute = getattr(config, "position_embedding_type", None) in (None, "absolute")
    exact = isinstance(block.intermediate.intermediate_act_fn, (nn.GELU, GELUActivation))
    exact = exact and getattr(block.intermediate.intermediate_act_fn, "approximate", "none") == "none"
    return absolute and exact and not block.is_decoder and not block.add_cross_attention


def _same_weights(block: Any, template: Template) -> bool:
    """Whether the block has exactly the parameters the template reads, its matrices in plain linear layers."""
    linear = all(
        type(block.get_submodule(name.rpartition(".")[0])) is nn.Linear
        for name, value in block.named_parameters()
        if value.dim() == 2
    )
    return linear and not list(block.named_buffers()) and {n for n, _ in block.named_parameters()} == template.weights
