"""What a training step holds for its backward pass, by budget and by what is alive."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.data import evaluation_batches
from edge_runtime.engine.model import BlockEngine
from edge_runtime.engine.remembered import RememberedHidden
from tests.edge.training.random_learning import alive_from, random_dataset, random_parameters

LENGTH, EXAMPLES, BLOCKS = 9, 2, 3
WIDTH = 32


@pytest.fixture
def bundle(llama_bundle: Path) -> Bundle:
    return open_bundle(llama_bundle)


def kept_bytes(engine: BlockEngine, bundle: Bundle, lowest: int = 0, memory: RememberedHidden | None = None) -> int:
    """After two steps: the first learns what blocks keep. With ``memory`` the second reads it."""
    (batch,) = evaluation_batches(random_dataset(bundle, [LENGTH] * EXAMPLES), EXAMPLES)
    engine.use(random_parameters(bundle, alive_from(bundle, lowest)), memory)
    for _ in range(2):
        engine.gradients(batch)
    return engine.kept_bytes


def hidden_bytes(bundle: Bundle) -> int:
    (batch,) = evaluation_batches(random_dataset(bundle, [LENGTH] * EXAMPLES), EXAMPLES)
    return 4 * batch.input_ids.size * WIDTH


def weights_mb(bundle: Bundle) -> float:
    return sum(array.nbytes for array in bundle.weights().values()) / (1 << 20)


@pytest.mark.parametrize("lowest", [0, 1, 2])
def test_a_budget_for_the_weights_alone_keeps_inputs_only(bundle: Bundle, lowest: int) -> None:
    """One hidden state a trained block and the last output; what the blocks below the lowest alive one see is gone."""
    engine = BlockEngine(bundle, memory_budget_mb=weights_mb(bundle))
    assert kept_bytes(engine, bundle, lowest) == (BLOCKS - lowest + 1) * hidden_bytes(bundle)


def test_activations_are_kept_by_block(bundle: Bundle) -> None:
    """Without a bound all of them: the same for every block, but that the lowest makes no gradient of its input."""
    engine = BlockEngine(bundle)
    assert engine.kept_bytes == 0
    one, two, three = (kept_bytes(engine, bundle, lowest) for lowest in (2, 1, 0))
    assert three - two == two - one > hidden_bytes(bundle)
    assert one > 2 * hidden_bytes(bundle)


def test_remembering_holds_what_computing_holds(bundle: Bundle, tmp_path: Path) -> None:
    engine = BlockEngine(bundle)
    computed = kept_bytes(engine, bundle, 2)
    with RememberedHidden(tmp_path, max_bytes=1 << 20) as memory:
        assert kept_bytes(engine, bundle, 2, memory) == computed


def test_evaluation_keeps_nothing_and_changes_nothing(bundle: Bundle) -> None:
    engine = BlockEngine(bundle)
    before = kept_bytes(engine, bundle)
    (batch,) = evaluation_batches(random_dataset(bundle, [12, 12, 12]), 4)
    engine.evaluate(batch)
    assert engine.kept_bytes == before
