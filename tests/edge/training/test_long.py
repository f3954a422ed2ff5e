"""2,048 tokens: the head in chunks, activations recomputed, one example at a time, and autograd's gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.data import evaluation_batches
from edge_runtime.engine.block import OrtValues, Session
from edge_runtime.engine.model import BlockEngine
from edge_runtime.training.accumulate import accumulate, default_micro_tokens
from edge_runtime.training.local import Course, train
from edge_runtime.wire import Training
from tests.conftest import export
from tests.edge.engine.test_parity import autograd
from tests.edge.training.random_learning import alive_from, random_dataset, random_parameters, relative_error

TOKENS = 2048
VOCABULARY = 8192  # four chunks
pytestmark = [pytest.mark.slow, pytest.mark.needs_torch("exports and checks a model of its own")]


@pytest.fixture(scope="module")
def folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' Llama with two blocks, 2,048 positions and more words than its tokenizer knows."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("long")
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(folder)
    config = LlamaConfig.from_pretrained(
        llama_folder, max_position_embeddings=TOKENS, vocab_size=VOCABULARY, num_hidden_layers=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "long"
    return open_bundle(export(folder, "lm", out, "--max-tokens", str(TOKENS)))


@pytest.fixture
def head_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every run of the head."""
    seen: list[int] = []
    run = Session.run

    def counted(session: Session, *sources: OrtValues) -> OrtValues:
        if "next_total" in session.outputs:
            seen.append(sources[0]["normed"].shape()[0])
        return run(session, *sources)

    monkeypatch.setattr(Session, "run", counted)
    return seen


def test_long_examples_have_the_gradients_of_autograd(
    bundle: Bundle, folder: Path, tmp_path: Path, head_rows: list[int]
) -> None:
    """Two examples, which autograd takes together, in pieces of one; nothing is kept but the inputs of the blocks."""
    (batch,) = evaluation_batches(random_dataset(bundle, [1500, TOKENS]), 2)
    parameters = random_parameters(bundle, alive_from(bundle, 0))
    loss, wanted, _ = autograd(folder, bundle, parameters.tensors, batch, tmp_path)
    engine = BlockEngine(bundle, memory_budget_mb=0)
    engine.use(parameters)
    made = accumulate(engine, batch, TOKENS)
    assert made.score.loss == pytest.approx(loss, rel=1e-4)
    assert relative_error(made.tensors, wanted) < 1e-4
    assert len(head_rows) > 2 * VOCABULARY // 2048  # about 750 and 1,024 trained tokens, in chunks of the vocabulary
    assert max(head_rows) * 2048 * 4 <= 4 << 20
    _, _, tape = engine._forward(batch, taped=True)
    assert [set(kept) for _, _, kept in tape] == [{"hidden", "out"}] * 2


def test_long_examples_train(bundle: Bundle) -> None:
    """Three epochs over texts of all lengths, in the pieces of a device with next to no memory."""
    dataset = random_dataset(bundle, [TOKENS, 40, 1030, 8])
    settings = Training(batch_size=4, max_tokens=TOKENS, lr_a=1e-2, lr_b=1e-2, lr_head=0.0, epochs=3)
    parameters = random_parameters(bundle, alive_from(bundle, 1))
    micro_tokens = default_micro_tokens(bundle.manifest, 0)
    course = Course(dataset, settings, np.random.default_rng(0), micro_tokens=micro_tokens)
    trained = train(BlockEngine(bundle, memory_budget_mb=0), parameters, course)
    assert trained.steps == 3
    assert trained.loss_end < trained.loss_start
