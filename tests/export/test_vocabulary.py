"""The output projection in chunks: any split of the vocabulary gives autograd's loss and gradient."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.bundle import Array
from export.runner import open_session
from export.templates.vocabulary import vocabulary_graph

WIDTH, CLASSES, ROWS = 6, 23, 5
SESSION = open_session(vocabulary_graph("weight", "bias", WIDTH).SerializeToString())
NAMES = ("top", "total", "gold", "pull", "target")


def run_in_chunks(normed: Array, weight: Array, bias: Array, labels: Array, edges: list[int]) -> dict[str, Array]:
    """The state after all chunks, and the logits put side by side."""
    narrow, wide = np.zeros((ROWS, 1), np.float32), np.zeros((ROWS, WIDTH), np.float32)
    state = {"top": narrow - 1e30, "total": narrow, "gold": narrow, "pull": wide, "target": wide}
    logits = []
    for first, last in itertools.pairwise(edges):
        inside = (first <= labels) & (labels < last)
        inputs = {
            "normed": normed,
            "labels": np.where(inside, labels - first, 0),
            "inside": inside[:, None],
            "w:weight": weight[first:last],
            "w:bias": bias[first:last],
            **state,
        }
        made = dict(
            zip(("logits", *NAMES), SESSION.run(["logits", *(f"next_{n}" for n in NAMES)], inputs), strict=True)
        )
        logits.append(made.pop("logits"))
        state = made
    return {**state, "logits": np.concatenate(logits, axis=1)}


@settings(deadline=None, max_examples=40)
@given(
    inner=st.sets(st.integers(1, CLASSES - 1)), seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0.1, 1.0, 30.0])
)
def test_any_split_gives_autograds_loss_and_gradient(inner: set[int], seed: int, spread: float) -> None:
    """Chunks of one row too, and logits so far apart that exp of their difference vanishes."""
    rng = np.random.default_rng(seed)
    normed, weight, bias = (
        rng.normal(scale=scale, size=size).astype(np.float32)
        for scale, size in ((spread, (ROWS, WIDTH)), (1.0, (CLASSES, WIDTH)), (1.0, CLASSES))
    )
    labels = rng.integers(0, CLASSES, ROWS)
    state = run_in_chunks(normed, weight, bias, labels, [0, *sorted(inner), CLASSES])
    rows = torch.tensor(normed, dtype=torch.float64, requires_grad=True)
    logits = torch.nn.functional.linear(rows, torch.tensor(weight).double(), torch.tensor(bias).double())
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
    loss.backward()
    found = (state["top"] + np.log(state["total"]) - state["gold"]).sum(dtype=np.float64)
    assert found == pytest.approx(loss.item(), rel=1e-5, abs=1e-5 * spread)
    gradient = state["pull"] / state["total"] - state["target"]
    assert rows.grad is not None
    np.testing.assert_allclose(gradient, rows.grad.numpy(), atol=1e-4)
    np.testing.assert_allclose(state["logits"], logits.detach().numpy(), atol=1e-4 * spread)
    assert ((state["gold"] >= state["top"]).ravel() == (logits.argmax(1).numpy() == labels)).all()
