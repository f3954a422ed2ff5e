"""A frozen linear layer with or without a LoRA pair, forward and backward.

y = x Wᵀ + b + h Bᵀ with h = scale · x Aᵀ; the scale is applied where the tensor is thinnest. Weights are read as they
lie, never transposed. A gradient nobody asks for leaves its product without users, and pruning drops it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from export.lora import LORA_A, LORA_B, SCALE
from export.templates.builder import GraphBuilder


@dataclass(frozen=True)
class Linear:
    """The layer at ``path``; shapes: x (tokens, in), y (tokens, out), h (tokens, rank)."""

    path: str
    bias: bool = False
    adapted: bool = False  # has a LoRA pair

    @property
    def weight(self) -> str:
        """Graph input of the frozen weight, (out, in)."""
        return f"w:{self.path}.weight"

    def forward(self, g: GraphBuilder, x: str, plus: str | None = None) -> tuple[str, str | None]:
        """Returns y, to which ``plus`` (tokens, out) is added, and h where there is a LoRA pair."""
        bias = f"w:{self.path}.bias" if self.bias else None
        y = g.product(x, self.weight, plus=bias or plus, transB=1)
        h = None
        if self.adapted:
            h = g.op("Mul", g.product(x, f"{LORA_A}:{self.path}", transB=1), f"{SCALE}:{self.path}")
            y = g.product(h, f"{LORA_B}:{self.path}", plus=y, transB=1)
        return (g.op("Add", y, plus) if bias and plus else y), h

    def backward(self, g: GraphBuilder, d_y: str, taped: tuple[str, str | None], plus: str | None = None) -> str:
        """Make the factors' gradients; returns the gradient of x, to which ``plus`` (tokens, in) is added.

        Args:
            g: The graph.
            d_y: Gradient of y, (tokens, out).
            taped: x, the forward pass's or made again, and h as the forward pass returned it.
            plus: What else flows back to x.
        """
        x, h = taped
        d_x = g.product(d_y, self.weight, plus=plus)
        if h is None:
            return d_x
        factor_a, factor_b = f"{LORA_A}:{self.path}", f"{LORA_B}:{self.path}"
        g.result(g.product(d_y, h, transA=1), f"d_{factor_b}")
        d_h = g.op("Mul", g.product(d_y, factor_b), f"{SCALE}:{self.path}")
        g.result(g.product(d_h, x, transA=1), f"d_{factor_a}")
        return g.product(d_h, factor_a, plus=d_x)


def backward_of_all(
    g: GraphBuilder, layers: Sequence[Linear], d_ys: Sequence[str], x: str, hs: Sequence[str | None]
) -> str:
    """Backward of layers that read the same x: returns the sum of their gradients of it."""
    d_x: str | None = None
    for layer, d_y, h in zip(layers, d_ys, hs, strict=True):
        d_x = layer.backward(g, d_y, (x, h), plus=d_x)
    return str(d_x)
