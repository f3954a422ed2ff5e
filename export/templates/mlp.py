"""The two activations between the linear layers of a block's MLP, forward and backward, on (tokens, inner) tensors.

They are as wide as a block gets, so the forward pass is one or two fused operators, and only their inputs are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from export.templates.builder import GraphBuilder


def swiglu(g: GraphBuilder, gate: str, up: str) -> str:
    """silu(gate) ∘ up, after Shazeer (arXiv 2002.05202); silu(x) = x · sigmoid(x)."""
    return g.op("Mul", g.op("QuickGelu", gate, alpha=1.0), up)


@dataclass(frozen=True)
class Gated:
    """What the backward pass of swiglu reads, made again: its inputs, s = sigmoid(gate), a = gate·s, y = a·up."""

    gate: str
    up: str
    s: str
    a: str
    y: str


def swiglu_again(g: GraphBuilder, gate: str, up: str) -> Gated:
    """The output and its parts, made again for the backward pass."""
    s = g.op("Sigmoid", gate)
    a = g.op("Mul", gate, s)
    return Gated(gate, up, s, a, g.op("Mul", a, up))


def swiglu_backward(g: GraphBuilder, d_y: str, made: Gated) -> tuple[str, str]:
    """Gradients of gate and up; silu'(x) = s·(1 - a) + a."""
    slope = g.op("Add", g.op("Mul", made.s, g.op("Sub", g.number(1.0), made.a)), made.a)
    return g.op("Mul", g.op("Mul", d_y, made.up), slope), g.op("Mul", d_y, made.a)


def gelu(g: GraphBuilder, x: str) -> str:
    """x · Φ(x) with the error function, after Hendrycks and Gimpel (arXiv 1606.08415)."""
    return g.op("Gelu", x)


@dataclass(frozen=True)
class Activated:
    """What the backward pass of gelu reads, made again: z = x/√2, phi = Φ(x) = ½ (1 + erf(z)), y = x·Φ(x)."""

    z: str
    phi: str
    y: str


def gelu_again(g: GraphBuilder, x: str) -> Activated:
    """The output and its parts, made again for the backward pass."""
    z = g.op("Mul", x, g.number(math.sqrt(0.5)))
    phi = g.op("Mul", g.op("Add", g.op("Erf", z), g.number(1.0)), g.number(0.5))
    return Activated(z, phi, g.op("Mul", x, phi))


def gelu_backward(g: GraphBuilder, d_y: str, made: Activated) -> str:
    """Gradient of x: gelu'(x) = Φ(x) + z·exp(-z²)/√π, the division inside the exponential."""
    exponent = g.op("Sub", g.number(-0.5 * math.log(math.pi)), g.op("Mul", made.z, made.z))
    slope = g.op("Add", made.phi, g.op("Mul", made.z, g.op("Exp", exponent)))
    return g.op("Mul", d_y, slope)
