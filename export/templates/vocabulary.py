"""One chunk of a language model's output projection with its share of the cross-entropy, forward and backward.

The gradient of the loss for a row is E[w] - w[label] with the expectation under softmax, so one pass over the
vocabulary can keep a running sum of exp(logit) · w, rescaled whenever a larger logit appears, as attention over chunks
of keys does (Dao et al., arXiv 2205.14135). Each chunk of weights is read, and turned to float32, once.
"""

from __future__ import annotations

from typing import Any

import torch

from export.templates.builder import GraphBuilder
from export.tracing import ROWS, SIZES, Input

_STATE = ("top", "total", "gold", "pull", "target")
_CHUNK = "chunk"


def vocabulary_graph(weight: str, bias: str | None, width: int) -> Any:
    """The graph of :class:`edge_runtime.bundle.Vocabulary`.

    Args:
        weight: Name of the projection's weight, (vocab_size, width).
        bias: Name of its bias, (vocab_size,), where it has one.
        width: Size of the hidden state.

    Raises:
        TraceError: the graph holds what a bundle may not hold.
    """
    inputs = _inputs(weight, bias, width)
    g = GraphBuilder(inputs)
    w = f"w:{weight}"
    logits = g.product("normed", w, plus=f"w:{bias}" if bias else None, transB=1)
    top = g.op("Max", "top", g.op("ReduceMax", logits, g.sizes(1), keepdims=1))
    powers = g.op("Exp", g.op("Sub", logits, top))
    shrink = g.op("Exp", g.op("Sub", "top", top))
    total = g.op("Add", g.op("Mul", "total", shrink), g.op("ReduceSum", powers, g.sizes(1), keepdims=1))
    column = g.op("Unsqueeze", "labels", g.sizes(1))
    gold = g.op("Where", "inside", g.op("GatherElements", logits, column, axis=1), "gold")
    pull = g.product(powers, w, plus=g.op("Mul", "pull", shrink))
    target = g.op("Where", "inside", g.op("Gather", w, "labels", axis=0), "target")
    for name, value in zip(_STATE, (top, total, gold, pull, target), strict=True):
        g.result(value, f"next_{name}")
    g.result(logits, "logits")
    return g.model(inputs, ["logits", *(f"next_{name}" for name in _STATE)])


def _inputs(weight: str, bias: str | None, width: int) -> list[Input]:
    n, c = SIZES[ROWS], 3
    by_row = {0: ROWS}
    wide, narrow = torch.zeros(n, width), torch.zeros(n, 1)
    return [
        Input("normed", wide, by_row),
        Input("labels", torch.zeros(n, dtype=torch.int64), by_row),
        Input("inside", torch.zeros(n, 1, dtype=torch.bool), by_row),
        *(Input(name, wide if name in ("pull", "target") else narrow, by_row) for name in _STATE),
        Input(f"w:{weight}", torch.zeros(c, width), {0: _CHUNK}),
        *([Input(f"w:{bias}", torch.zeros(c), {0: _CHUNK})] if bias else []),
    ]
