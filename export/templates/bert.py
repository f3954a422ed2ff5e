"""The BERT block: attention and a GELU MLP, each followed by a layer norm of the sum with its input."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from export.templates.attention import Attention
from export.templates.builder import GraphBuilder
from export.templates.frame import Template, linear, weights_of
from export.templates.linear import Linear, backward_of_all
from export.templates.mlp import gelu, gelu_again, gelu_backward
from export.templates.norms import LayerNorm

_PROJECTIONS = *(f"attention.self.{name}" for name in ("query", "key", "value")), "attention.output.dense"
_MLP = "intermediate.dense", "output.dense"
_NORMS = "attention.output.LayerNorm", "output.LayerNorm"


@dataclass(frozen=True)
class BertBlock:
    """x1 = norm(x + o(attend(q, k, v of x))), then out = norm(x1 + outer(gelu(inner(x1))))."""

    attention: Attention
    norms: tuple[LayerNorm, LayerNorm]
    projections: tuple[Linear, Linear, Linear, Linear]  # query, key, value, output
    mlp: tuple[Linear, Linear]

    def body(self, g: GraphBuilder, x: str) -> tuple[str, Callable[[str], str]]:
        """Append the block; x and out (tokens, width)."""
        summed, attention_backward = self._attend(g, x)
        first = self.norms[0].forward(g, summed)
        summed, mlp_backward = self._mlp(g, first.y)
        second = self.norms[1].forward(g, summed)

        def backward(d_out: str) -> str:
            rows = self.norms[1].rows(g, second)
            d_summed = self.norms[1].backward(g, d_out, rows, second)
            rows = self.norms[0].rows(g, first)
            d_first = mlp_backward(d_summed, self.norms[0].again(g, rows))
            return attention_backward(self.norms[0].backward(g, d_first, rows, first))

        return second.y, backward

    def _attend(self, g: GraphBuilder, x: str) -> tuple[str, Callable[[str], str]]:
        *inner, outer = self.projections
        (q, h_q), (k, h_k), (v, h_v) = (layer.forward(g, x) for layer in inner)
        mixed, attention_backward = self.attention.forward(g, q, k, v)
        summed, h_outer = outer.forward(g, mixed, plus=x)

        def backward(d_summed: str) -> str:
            gradients = attention_backward(outer.backward(g, d_summed, (mixed, h_outer)))
            return g.op("Add", backward_of_all(g, inner, gradients, x, (h_q, h_k, h_v)), d_summed)

        return summed, backward

    def _mlp(self, g: GraphBuilder, x: str) -> tuple[str, Callable[[str, str], str]]:
        """Like :meth:`_attend`, but the backward pass is given x made again."""
        inner, outer = self.mlp
        wide, h_inner = inner.forward(g, x)
        summed, h_outer = outer.forward(g, gelu(g, wide), plus=x)

        def backward(d_summed: str, x_again: str) -> str:
            active = gelu_again(g, wide)
            d_wide = gelu_backward(g, outer.backward(g, d_summed, (active.y, h_outer)), active)
            return inner.backward(g, d_wide, (x_again, h_inner), plus=d_summed)

        return summed, backward


def bert_template(block: Any, slots: Collection[str], attention: Attention) -> Template:
    """The template of a BERT block.

    Args:
        block: The torch module, to read its settings from.
        slots: Paths of the layers with a LoRA pair.
        attention: Its attention, without rotary positions.
    """
    projections = tuple(linear(block, path, slots) for path in _PROJECTIONS)
    mlp = tuple(linear(block, path, slots) for path in _MLP)
    first, second = (LayerNorm(name, float(block.get_submodule(name).eps)) for name in _NORMS)
    written = BertBlock(attention, (first, second), projections, mlp)  # type: ignore[arg-type] # lengths as above
    weights = weights_of([*projections, *mlp]) | {f"{name}.{leaf}" for name in _NORMS for leaf in ("weight", "bias")}
    return Template("bert", frozenset(weights), written.body)
