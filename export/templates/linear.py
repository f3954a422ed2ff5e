"""A frozen linear layer with or without a LoRA pair, forward and backward.

y = x Wᵀ + b + h Bᵀ with h = scale · x Aᵀ; the scale is applied where the tensor is thinnest. Weights are read as they
lie, never transposed. A gradient nobody asks for leaves its product without users, and pruning drops it.
"""

from __future__ import annotations

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

    def forward(self, g: GraphBuilder, x: str) -> tuple[str, str | None]:
        """Returns y, and h where there is a LoRA pair."""
        bias = (f"w:{self.path}.bias",) if self.bias else ()
        y = g.op("Gemm", x, self.weight, *bias, transB=1)
        if not self.adapted:
            return y, None
        h = g.op("Mul", g.op("Gemm", x, f"{LORA_A}:{self.path}", transB=1), f"{SCALE}:{self.path}")
        return g.total(y, g.op("Gemm", h, f"{LORA_B}:{self.path}", transB=1)), h

    def backward(self, g: GraphBuilder, d_y: str, x: str, h: str | None) -> tuple[str, ...]:
        """Make the factors' gradients; returns the terms whose sum is the gradient of x.

        Args:
            g: The graph.
            d_y: Gradient of y, (tokens, out).
            x: The layer's input, the forward pass's or recomputed.
            h: What the forward pass returned.
        """
        d_x = g.op("Gemm", d_y, self.weight)
        if h is None:
            return (d_x,)
        factor_a, factor_b = f"{LORA_A}:{self.path}", f"{LORA_B}:{self.path}"
        g.result(g.transposed_product(d_y, h), f"d_{factor_b}")
        d_h = g.op("Mul", g.op("Gemm", d_y, factor_b), f"{SCALE}:{self.path}")
        g.result(g.transposed_product(d_h, x), f"d_{factor_a}")
        return d_x, g.op("Gemm", d_h, factor_a)
