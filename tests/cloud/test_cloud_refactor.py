"""Changing a module's rank: what is lost is the least that can be lost, and nothing jumps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cloud_fleet import make_bundle
from hypothesis import given
from hypothesis import strategies as st

from cloud.aggregate import module_movement, refactor
from cloud.aggregate.factors import components
from edge_runtime.bundle import adapter_shapes

Shapes = st.tuples(st.integers(1, 9), st.integers(1, 11), st.integers(1, 13))  # rank, out, in: mostly not square


def factors(rank: int, out: int, inner: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rank, inner)).astype(np.float32), rng.normal(size=(out, rank)).astype(np.float32)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@given(Shapes, st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_the_best_approximation_is_kept(shape: tuple[int, int, int], seed: int, wanted: int) -> None:
    """Eckart and Young: the error is that of the singular values left out, as the SVD of the whole matrix says."""
    lora_a, lora_b = factors(*shape, seed)
    whole = lora_b.astype(np.float64) @ lora_a
    a, b = refactor(lora_a, lora_b, wanted, rng=rng())
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((wanted, shape[2]), (shape[1], wanted), np.float32, np.float32)
    values = np.linalg.svd(whole, compute_uv=False)
    least = np.sqrt(np.sum(np.square(values[wanted:])))
    error = np.linalg.norm(b.astype(np.float64) @ a - whole)
    assert error <= least + 1e-5 * np.linalg.norm(whole)


@given(Shapes, st.integers(0, 2**32 - 1))
def test_components_are_the_svd(shape: tuple[int, int, int], seed: int) -> None:
    lora_a, lora_b = factors(*shape, seed)
    found = components(lora_a, lora_b)
    wanted = np.linalg.svd(lora_b.astype(np.float64) @ lora_a, compute_uv=False)[: len(found.values)]
    np.testing.assert_allclose(found.values[: len(wanted)], wanted, atol=1e-12 * max(wanted[0], 1))
    assert np.all(np.diff(found.values) <= 0)


@pytest.mark.parametrize("wanted", [3, 4, 9])
def test_a_lossless_change_is_the_same_function(wanted: int) -> None:
    lora_a, lora_b = factors(3, 40, 30, seed=1)
    x = np.random.default_rng(2).normal(size=(50, 30))
    a, b = refactor(lora_a, lora_b, wanted, rng=rng())
    before, after = (x @ side_a.T.astype(np.float64) @ side_b.T for side_a, side_b in ((lora_a, lora_b), (a, b)))
    assert np.linalg.norm(after - before) <= 1e-5 * np.linalg.norm(before)


def test_rows_keep_their_size() -> None:
    """So that learning rates of A go on to fit; what grows has a random row and no effect."""
    lora_a, lora_b = factors(4, 40, 30, seed=3)
    size = np.sqrt(np.mean(np.sum(lora_a**2, axis=1)))
    a, b = refactor(lora_a, lora_b, 6, rng=rng())
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), size, rtol=1e-5)
    assert not b[:, 4:].any()
    again, _ = refactor(lora_a, lora_b, 6, rng=rng())
    np.testing.assert_array_equal(a, again)


def test_before_b_has_moved_the_rows_stay() -> None:
    """At the start there is no energy to sort by: cutting takes the first rows, growing keeps all of them."""
    lora_a = factors(4, 7, 6, seed=4)[0]
    zero = np.zeros((7, 4), np.float32)
    for wanted in (2, 4, 6):
        a, b = refactor(lora_a, zero, wanted, rng=rng())
        np.testing.assert_array_equal(a[: min(wanted, 4)], lora_a[:wanted])
        assert not b.any()
        assert np.all(np.linalg.norm(a, axis=1) > 0)


def test_movement_is_the_norm_of_the_change(tmp_path: Path) -> None:
    """Of s·B·A, against whole matrices, with another rank and factors; what did not move is exactly zero."""
    manifest = make_bundle(tmp_path / "bundle").manifest
    generator = np.random.default_rng(0)

    def adapter(rank: int) -> dict[str, np.ndarray]:
        shapes = adapter_shapes(manifest, dict.fromkeys(manifest.module_names, rank))
        return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    before, after = adapter(3), adapter(2)
    still = manifest.module_names[0]
    after |= {f"{still}.lora_a": before[f"{still}.lora_a"], f"{still}.lora_b": before[f"{still}.lora_b"]}
    found = module_movement(manifest, before, after)
    for name in manifest.module_names:
        old, new = (side[f"{name}.lora_b"].astype(float) @ side[f"{name}.lora_a"] for side in (before, after))
        assert found[name] == pytest.approx(manifest.scale * np.linalg.norm(new - old), rel=1e-9)
    assert found[still] == 0.0
