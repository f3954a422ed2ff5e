"""What every block template shares: reading the hidden states as matrices, and the block's two ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from export.templates.builder import GraphBuilder
from export.templates.linear import Linear
from export.tracing import D_HIDDEN, D_OUT, HIDDEN, OUT, Input

# Appends a block's operators: (graph, hidden) -> (out, backward), backward: d_out -> d_hidden, all (tokens, width).
Body = Callable[[GraphBuilder, str], tuple[str, Callable[[str], str]]]


@dataclass(frozen=True)
class Template:
    """A block of a known family, ready to be written.

    Attributes:
        family: For reports, "llama" or "bert".
        weights: Every parameter the template reads; a block with others is not of this family.
        body: The block itself.
        long: The same with less work on long sequences, where that is known.
    """

    family: str
    weights: frozenset[str]
    body: Body
    long: Body | None = None

    def build(self, inputs: Sequence[Input], outputs: Sequence[str]) -> Any:
        """The block's joint graph, an ``onnx.ModelProto``.

        Args:
            inputs: Those of the block's contract, the hidden state first.
            outputs: Names of the contract's results, in order.

        Raises:
            TraceError: the graph holds what a bundle may not hold.
        """
        width = int(inputs[0].example.shape[-1])
        g = GraphBuilder()
        out, backward = self.body(g, g.reshape(HIDDEN, -1, width))
        g.result(g.by_position(out, width), OUT)
        g.result(g.by_position(backward(g.reshape(D_OUT, -1, width)), width), D_HIDDEN)
        return g.model(inputs, outputs)


def linear(block: Any, path: str, slots: Collection[str]) -> Linear:
    """The template's view of a block's linear layer."""
    return Linear(path, bias=block.get_submodule(path).bias is not None, adapted=path in slots)


def weights_of(layers: Sequence[Linear]) -> set[str]:
    """Parameters that the layers read."""
    return {f"{layer.path}.{leaf}" for layer in layers for leaf in ("weight", "bias")[: 1 + layer.bias]}
