"""Weights packed for their products: the same gradients, in sessions of their own for as many blocks as fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle import Bundle, file_offset, map_tensors, open_bundle, write_tensors
from edge_runtime.data import Batch
from edge_runtime.engine.budget import packed_from
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.frozen import FrozenWeights
from edge_runtime.engine.interface import Gradients
from edge_runtime.engine.model import BlockEngine
from edge_runtime.training.session import WorkingBundle


@pytest.fixture(params=["bert", "llama"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """Both model types."""
    return open_bundle(request.getfixturevalue(f"{request.param}_bundle"))


def gradients(engine: BlockEngine, bundle: Bundle) -> Gradients:
    """One step's, on two examples of nine tokens, everything random and alive."""
    rng = np.random.default_rng(3)
    start = bundle.initial_adapter()
    adapter = {name: rng.normal(scale=0.1, size=array.shape).astype(np.float32) for name, array in start.items()}
    ids = rng.integers(4, bundle.manifest.text.vocab_size, size=(2, 9))
    batch = Batch(ids, np.ones_like(ids), rows=np.array([0, 9]), labels=np.array([1, 3]), examples=np.arange(2))
    engine.use(WorkingBundle(bundle).all_alive(adapter))
    return engine.gradients(batch)


def test_packed_weights_give_the_same_gradients(bundle: Bundle) -> None:
    """Every block has sessions of its own that ask for no weight, and what they make is the same."""
    mapped, packed = BlockEngine(bundle), BlockEngine(bundle, packed=True)
    wanted, found = gradients(mapped, bundle), gradients(packed, bundle)
    assert sorted(packed._packed) == [0, 1, 2]
    assert not any(name.startswith("w:") for name in packed._packed[1].short.forward().inputs)
    for name, gradient in wanted.tensors.items():
        np.testing.assert_allclose(found.tensors[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)


def test_no_budget_packs_nothing(bundle: Bundle) -> None:
    """Packing is asked for, but there is no memory for it."""
    assert BlockEngine(bundle, memory_budget_mb=0, packed=True)._packed == {}


def test_the_highest_blocks_are_packed_first() -> None:
    """Two copies of each, as many as fit."""
    assert packed_from(100, [10, 10, 10]) == 0
    assert packed_from(45, [10, 10, 10]) == 1
    assert packed_from(19, [10, 10, 10]) == 3
    assert packed_from(0, []) == 0


def test_only_float32_is_packed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant that has to be restored would be restored for good: four times the memory."""
    monkeypatch.setattr(FrozenWeights, "packed", lambda self, block, folder: None)
    with pytest.raises(EngineInputError, match="packed weights: a bundle of base fp32 has none, only fp32"):
        BlockEngine(bundle, packed=True)


def test_where_a_mapped_array_lies(tmp_path: Path) -> None:
    """The offset leads to the array's bytes in its file."""
    path = tmp_path / "weights.safetensors"
    values = np.arange(40_000, dtype=np.float32)
    write_tensors(path, {"large": values, "small": values[:3]})
    for name, array in map_tensors(path).items():
        offset = file_offset(array)
        assert offset is not None
        assert path.read_bytes()[offset : offset + array.nbytes] == array.tobytes(), name
    assert file_offset(values) is None
