"""The language model's head in chunks of rows and vocabulary: nothing depends on how it is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle import open_bundle
from edge_runtime.data import Batch
from edge_runtime.engine import vocabulary
from edge_runtime.engine.model import BlockEngine
from edge_runtime.training.session import WorkingBundle


def batch_of(engine_vocabulary: int, rng: np.random.Generator) -> Batch:
    """Two examples of nine tokens, every next token trained."""
    ids = rng.integers(0, engine_vocabulary, size=(2, 9))
    rows = np.arange(18).reshape(2, 9)[:, :-1].reshape(-1)
    return Batch(ids, np.ones_like(ids), rows=rows, labels=ids[:, 1:].reshape(-1), examples=np.arange(2))


def test_chunks_change_nothing(llama_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of the vocabulary and three of the batch at a time: the same loss, logits and gradients."""
    bundle = open_bundle(llama_bundle)
    rng = np.random.default_rng(0)
    adapter = {
        name: rng.normal(scale=0.1, size=array.shape).astype(np.float32)
        for name, array in bundle.initial_adapter().items()
    }
    parameters = WorkingBundle(bundle).all_alive(adapter)
    batch = batch_of(bundle.manifest.text.vocab_size, rng)
    whole = BlockEngine(bundle)
    monkeypatch.setattr(vocabulary, "_CHUNK", 7)
    monkeypatch.setattr(vocabulary, "_ROWS", 3)
    cut = BlockEngine(bundle)
    whole.use(parameters)
    expected, logits, score = whole.gradients(batch), whole.logits(batch), whole.evaluate(batch)
    cut.use(parameters)
    found = cut.gradients(batch)
    assert found.score.loss_sum == pytest.approx(expected.score.loss_sum, rel=1e-5)
    assert (found.score.correct, found.score.rows) == (expected.score.correct, 16)
    for name, gradient in expected.tensors.items():
        np.testing.assert_allclose(found.tensors[name], gradient, rtol=1e-3, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(cut.logits(batch), logits, atol=1e-5)
    assert cut.evaluate(batch).loss_sum == pytest.approx(score.loss_sum, rel=1e-5)
    assert logits.shape == (16, bundle.manifest.text.vocab_size)
