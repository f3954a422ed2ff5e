"""Training with int8 products, and weights that give their memory back."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle import (
    Array,
    Bundle,
    int8_products,
    int8_rows,
    map_tensors,
    open_bundle,
    release_pages,
    write_tensors,
)
from edge_runtime.bundle.errors import TensorFileError
from edge_runtime.data import Batch
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.interface import Gradients
from edge_runtime.engine.model import BlockEngine
from edge_runtime.engine.saturation import saturates
from edge_runtime.training.session import WorkingBundle

RNG_SEED = 3


@pytest.fixture(params=["bert", "llama"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """Both model types."""
    return open_bundle(request.getfixturevalue(f"{request.param}_bundle"))


def some_batch(bundle: Bundle) -> Batch:
    """Two examples of nine tokens."""
    rng = np.random.default_rng(RNG_SEED)
    ids = rng.integers(4, bundle.manifest.text.vocab_size, size=(2, 9))
    if bundle.manifest.task == "classify":
        return Batch(ids, np.ones_like(ids), rows=np.array([0, 9]), labels=np.array([1, 3]), examples=np.arange(2))
    rows = np.arange(18).reshape(2, 9)[:, :-1].reshape(-1)
    return Batch(ids, np.ones_like(ids), rows=rows, labels=ids[:, 1:].reshape(-1), examples=np.arange(2))


def gradients(engine: BlockEngine, bundle: Bundle) -> Gradients:
    """One step's, with every factor random and alive."""
    rng = np.random.default_rng(RNG_SEED)
    start = bundle.initial_adapter()
    adapter = {name: rng.normal(scale=0.1, size=array.shape).astype(np.float32) for name, array in start.items()}
    engine.use(WorkingBundle(bundle).all_alive(adapter))
    return engine.gradients(some_batch(bundle))


def whole(made: Gradients) -> Array:
    return np.concatenate([made.tensors[name].ravel() for name in sorted(made.tensors)])


@pytest.mark.parametrize("budget_mb", [None, 0])
def test_int8_products_are_near_the_exact_ones(bundle: Bundle, budget_mb: int | None) -> None:
    """Kept or recomputed: all gradients together within 10 %, not equal, and evaluation is exact.

    Within 20 % on a processor that has a bit less for the weights; what saturated would be 28 % off.
    """
    exact = BlockEngine(bundle)
    fast = BlockEngine(bundle, memory_budget_mb=budget_mb, products="int8")
    wanted, found = whole(gradients(exact, bundle)), whole(gradients(fast, bundle))
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < (0.2 if saturates() else 0.1)
    np.testing.assert_array_equal(fast.logits(some_batch(bundle)), exact.logits(some_batch(bundle)))


def test_int8_of_a_bundle_without_is_refused(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear line, before anything is trained."""
    for kind in bundle.manifest.kinds:
        monkeypatch.setattr(type(kind), "fast", None, raising=False)
    with pytest.raises(EngineInputError, match="int8 products: a bundle of base fp32 has none"):
        BlockEngine(bundle, products="int8")


def test_no_budget_computes_the_same_and_keeps_no_weights(bundle: Bundle) -> None:
    """Weights whose pages are given back after every block are read again as they were."""
    kept, tight = BlockEngine(bundle), BlockEngine(bundle, memory_budget_mb=0)
    wanted = gradients(kept, bundle)
    for _ in range(2):
        found = gradients(tight, bundle)
        np.testing.assert_allclose(whole(found), whole(wanted), rtol=1e-4, atol=1e-6)


def test_released_pages_leave_memory(tmp_path: Path) -> None:
    """A mapped tensor's pages count as this process's memory until they are released, and hold the same after it."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists() or not hasattr(mmap, "MADV_DONTNEED"):
        pytest.skip("the system does not tell which pages are in memory")
    path = tmp_path / "weights.safetensors"
    values = np.random.default_rng(0).normal(size=(512, 2048)).astype(np.float32)
    write_tensors(path, {"w": values, "other": values[:4]})
    mapped = map_tensors(path)["w"]
    total = float(mapped.sum())
    assert _resident_kb(smaps, path) >= 4096
    release_pages(mapped)
    assert _resident_kb(smaps, path) < 256
    assert float(mapped.sum()) == total
    release_pages(values)  # not mapped: nothing to do


def _resident_kb(smaps: Path, path: Path) -> int:
    lines = iter(smaps.read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(entry.split()[1]) for entry in lines if entry.startswith("Rss:"))
    return 0


def test_int8_form_is_the_weight() -> None:
    """q and its transpose are the same integers, and qs · q is near the weight; int8 storage is taken as it is."""
    weight = np.random.default_rng(1).normal(size=(6, 10)).astype(np.float32)
    weight[2] = 0
    form = int8_products("w", {"w": weight})
    np.testing.assert_array_equal(form["qt"], form["q"].T)
    np.testing.assert_allclose(form["q"] * form["qs"][:, None], weight, atol=np.abs(weight).max() / 254 * 1.01)
    again = int8_products("w", {"w": form["q"], "w:scale": form["qs"]})
    assert again["q"] is form["q"]
    np.testing.assert_array_equal(again["qs"], form["qs"])


def test_narrow_form_is_the_weight_in_seven_bits() -> None:
    """Two products of the largest activation, 255, fit 16 bits; the scale makes up for it."""
    weight = np.random.default_rng(1).normal(size=(6, 10)).astype(np.float32)
    rows, scale = int8_rows(weight)
    for tensors in ({"w": weight}, {"w": rows, "w:scale": scale}):
        form = int8_products("w", tensors, narrow=True)
        assert 2 * 255 * int(np.abs(form["q"].astype(int)).max()) < 2**15
        np.testing.assert_allclose(form["q"] * form["qs"][:, None], weight, atol=np.abs(weight).max() / 63 * 0.8)
        np.testing.assert_array_equal(form["qt"], form["q"].T)


def test_a_processor_that_saturates_gets_narrow_weights(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are near the exact ones too."""
    wanted = whole(gradients(BlockEngine(bundle), bundle))
    monkeypatch.setattr("edge_runtime.engine.frozen.saturates", lambda: True)
    engine = BlockEngine(bundle, products="int8")
    found = whole(gradients(engine, bundle))
    assert 1e-4 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.15
    read = [value.numpy() for name, value in engine._frozen.int8(0).items() if name.startswith("q:")]
    assert max(int(np.abs(rows.astype(int)).max()) for rows in read) == 63


@pytest.mark.parametrize("tensors", [{}, {"w": np.zeros((4, 4), np.uint8)}, {"w": np.zeros(4, np.float32)}])
def test_weights_without_an_int8_form(tensors: dict[str, Array]) -> None:
    """Missing, four bits, a vector: named."""
    with pytest.raises(TensorFileError, match="w: for int8 products: expected a matrix"):
        int8_products("w", tensors)
