"""Normalisation of rows, forward and backward.

Only the input and one or two numbers a row are kept; the backward pass makes the normalised rows again, which costs
one or two cheap products and saves an activation of full width.
"""

from __future__ import annotations

from dataclasses import dataclass

from export.templates.builder import GraphBuilder


@dataclass(frozen=True)
class Normalised:
    """What a norm's forward pass leaves: output y and input x (tokens, width); mean and 1/σ (tokens, 1)."""

    y: str
    x: str
    inverse: str
    mean: str | None = None


@dataclass(frozen=True)
class RmsNorm:
    """y = w ∘ x / √(mean(x²) + epsilon), after Zhang and Sennrich (arXiv 1910.07467)."""

    path: str
    epsilon: float

    def forward(self, g: GraphBuilder, x: str) -> Normalised:
        """Normalise the rows of x."""
        options = {"axis": -1, "epsilon": self.epsilon, "stash_type": 1}
        y, inverse = g.ops("SimplifiedLayerNormalization", 2, x, f"w:{self.path}.weight", **options)
        return Normalised(y, x, inverse)

    def rows(self, g: GraphBuilder, made: Normalised) -> str:
        """The normalised rows before the weight, made again."""
        return g.op("Mul", made.x, made.inverse)

    def again(self, g: GraphBuilder, rows: str) -> str:
        """The output y, made again from the normalised rows."""
        return g.op("Mul", rows, f"w:{self.path}.weight")

    def backward(self, g: GraphBuilder, d_y: str, rows: str, made: Normalised) -> str:
        """Gradient of x: (u - rows · mean(u ∘ rows)) / σ with u = d_y ∘ w."""
        u = g.op("Mul", d_y, f"w:{self.path}.weight")
        return g.op("Mul", g.op("Sub", u, _along(g, u, rows)), made.inverse)


@dataclass(frozen=True)
class LayerNorm:
    """y = w ∘ (x - mean(x)) / √(var(x) + epsilon) + b, after Ba, Kiros and Hinton (arXiv 1607.06450)."""

    path: str
    epsilon: float

    def forward(self, g: GraphBuilder, x: str) -> Normalised:
        """Normalise the rows of x."""
        weights = f"w:{self.path}.weight", f"w:{self.path}.bias"
        y, mean, inverse = g.ops("LayerNormalization", 3, x, *weights, axis=-1, epsilon=self.epsilon)
        return Normalised(y, x, inverse, mean)

    def rows(self, g: GraphBuilder, made: Normalised) -> str:
        """The normalised rows before weight and bias, made again."""
        return g.op("Mul", g.op("Sub", made.x, str(made.mean)), made.inverse)

    def again(self, g: GraphBuilder, rows: str) -> str:
        """The output y, made again from the normalised rows."""
        return g.op("Add", g.op("Mul", rows, f"w:{self.path}.weight"), f"w:{self.path}.bias")

    def backward(self, g: GraphBuilder, d_y: str, rows: str, made: Normalised) -> str:
        """Gradient of x: (u - mean(u) - rows · mean(u ∘ rows)) / σ with u = d_y ∘ w."""
        u = g.op("Mul", d_y, f"w:{self.path}.weight")
        centred = g.op("Sub", u, g.op("ReduceMean", u, g.sizes(1), keepdims=1))
        return g.op("Mul", g.op("Sub", centred, _along(g, u, rows)), made.inverse)


def _along(g: GraphBuilder, u: str, rows: str) -> str:
    """The part of u that lies along the rows: rows · mean(u ∘ rows)."""
    return g.op("Mul", rows, g.op("ReduceMean", g.op("Mul", u, rows), g.sizes(1), keepdims=1))
