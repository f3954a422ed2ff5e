"""The Llama block, and Qwen2's, which differs by biases: pre-norm attention with rotary positions, gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from export.templates.attention import Attention
from export.templates.builder import GraphBuilder
from export.templates.frame import Template, linear, weights_of
from export.templates.linear import Linear, backward_of_all
from export.templates.mlp import swiglu, swiglu_again, swiglu_backward
from export.templates.norms import RmsNorm

_PROJECTIONS = tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
_MLP = tuple(f"mlp.{word}_proj" for word in ("gate", "up", "down"))


@dataclass(frozen=True)
class LlamaBlock:
    """x1 = x + o(attend(q, k, v of norm(x))), then out = x1 + down(swiglu(gate, up of norm(x1)))."""

    attention: Attention
    norms: tuple[RmsNorm, RmsNorm]
    projections: tuple[Linear, Linear, Linear, Linear]  # q, k, v, o
    mlp: tuple[Linear, Linear, Linear]  # gate, up, down

    def body(self, g: GraphBuilder, x: str) -> tuple[str, Callable[[str], str]]:
        """Append the block; x and out (tokens, width)."""
        x1, attention_backward = self._attend(g, x)
        out, mlp_backward = self._mlp(g, x1)
        return out, lambda d_out: attention_backward(mlp_backward(d_out))

    def _attend(self, g: GraphBuilder, x: str) -> tuple[str, Callable[[str], str]]:
        norm, (*inner, outer) = self.norms[0], self.projections
        normed = norm.forward(g, x)
        (q, h_q), (k, h_k), (v, h_v) = (layer.forward(g, normed.y) for layer in inner)
        mixed, attention_backward = self.attention.forward(g, q, k, v)
        out, h_o = outer.forward(g, mixed, plus=x)

        def backward(d_out: str) -> str:
            rows = norm.rows(g, normed)
            gradients = attention_backward(outer.backward(g, d_out, (mixed, h_o)))
            d_normed = backward_of_all(g, inner, gradients, norm.again(g, rows), (h_q, h_k, h_v))
            return g.op("Add", norm.backward(g, d_normed, rows, normed), d_out)

        return out, backward

    def _mlp(self, g: GraphBuilder, x: str) -> tuple[str, Callable[[str], str]]:
        norm, (gate, up, down) = self.norms[1], self.mlp
        normed = norm.forward(g, x)
        (left, h_gate), (right, h_up) = gate.forward(g, normed.y), up.forward(g, normed.y)
        out, h_down = down.forward(g, swiglu(g, left, right), plus=x)

        def backward(d_out: str) -> str:
            rows = norm.rows(g, normed)
            gated = swiglu_again(g, left, right)
            gradients = swiglu_backward(g, down.backward(g, d_out, (gated.y, h_down)), gated)
            d_normed = backward_of_all(g, (gate, up), gradients, norm.again(g, rows), (h_gate, h_up))
            return g.op("Add", norm.backward(g, d_normed, rows, normed), d_out)

        return out, backward


def llama_template(block: Any, slots: Collection[str], attention: Attention) -> Template:
    """The template of a Llama or Qwen2 block.

    Args:
        block: The torch module, to read its settings from.
        slots: Paths of the layers with a LoRA pair.
        attention: Its attention, with rotary positions.
    """
    norms = ("input_layernorm", "post_attention_layernorm")
    projections = tuple(linear(block, path, slots) for path in _PROJECTIONS)
    mlp = tuple(linear(block, path, slots) for path in _MLP)
    first, second = (RmsNorm(name, float(block.get_submodule(name).variance_epsilon)) for name in norms)
    written = LlamaBlock(attention, (first, second), projections, mlp)  # type: ignore[arg-type] # lengths as above
    weights = weights_of([*projections, *mlp]) | {f"{name}.weight" for name in norms}
    return Template("llama", frozenset(weights), written.body)
