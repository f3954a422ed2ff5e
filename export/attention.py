"""Attention as the traced graphs compute it: grouped key/value heads without copies, and a mask that never gives NaN.

Registered with transformers under :data:`NAME`, so that any model that looks its attention up there can be traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function

from export.errors import ModelError

NAME = "emberlora"
# Arguments that change the result and that this function does not implement.
_UNKNOWN = ("softcap", "s_aux", "sinks", "head_mask", "position_bias")


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    **options: Any,
) -> tuple[Any, Any]:
    """Softmax attention; query heads of one group are stacked along the sequence instead of repeating keys.

    Args:
        module: The attention module, unused.
        query: (batch, heads, seq, head_dim).
        key: (batch, kv_heads, seq, head_dim); heads is a multiple of kv_heads.
        value: Like ``key``.
        attention_mask: Additive, broadcastable to (batch, heads, seq, seq).
        options: ``scaling`` and whatever else transformers passes.

    Returns:
        (batch, seq, heads, head_dim) and the probabilities.

    Raises:
        ModelError: the model needs a variant of attention that is not implemented here.
    """
    unknown = [name for name in _UNKNOWN if options.get(name) is not None]
    if unknown:
        raise ModelError(f"{type(module).__name__}: attention with {', '.join(unknown)} is not supported")
    batch, heads, seq, dim = query.shape
    groups = key.shape[1]
    scaling = options.get("scaling")
    scaling = dim**-0.5 if scaling is None else scaling
    stacked = (query * scaling).reshape(batch, groups, heads // groups * seq, dim)
    scores = torch.matmul(stacked, key.transpose(2, 3)).view(batch, heads, seq, key.shape[2])
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1)
    mixed = torch.matmul(weights.view(batch, groups, heads // groups * seq, key.shape[2]), value)
    return mixed.view(batch, heads, seq, dim).transpose(1, 2).contiguous(), weights


def make_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Any,
    dtype: Any = torch.float32,
    **options: Any,  # noqa: ARG001 - transformers passes more than is needed here
) -> Any:
    """Additive mask: 0 where attention is allowed, the lowest finite number elsewhere.

    The lowest *finite* number, because a row that may attend to nothing must give a uniform row and not NaN.

    Returns:
        (batch, 1, 1, seq) for bidirectional attention, else (batch, 1, seq, seq).
    """
    allowed = attention_mask[:, None, None, :].to(torch.bool)
    if mask_function is not bidirectional_mask_function:
        rows = torch.arange(q_length)[None, None, :, None]
        columns = torch.arange(kv_length)[None, None, None, :]
        allowed = mask_function(None, None, rows, columns) & allowed
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(allowed, torch.zeros((), dtype=dtype), lowest)


@contextmanager
def traceable_attention(model: Any) -> Iterator[None]:
    """Let ``model`` use :func:`attend` inside the context, and its own attention again afterwards."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
