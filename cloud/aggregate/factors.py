"""A module's factors written anew, so that its components are sorted and cutting the last of them loses least.

The product B·A of rank r has a singular value decomposition that two thin QR decompositions and the SVD of an (r, r)
matrix give; the (out, in) matrix is never formed. Everything is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_runtime.bundle import Array, Manifest

Double = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Components:
    """B·A = left · diag(values) · right, the values falling; left (out, r) and right (r, in) are orthonormal."""

    left: Double
    values: Double  # (r,)
    right: Double


def components(lora_a: Array | Double, lora_b: Array | Double) -> Components:
    """The singular components of B·A.

    Args:
        lora_a: Shape (r, in).
        lora_b: Shape (out, r).
    """
    q_b, r_b = np.linalg.qr(lora_b.astype(np.float64))
    q_a, r_a = np.linalg.qr(lora_a.astype(np.float64).T)
    left, values, right = np.linalg.svd(r_b @ r_a.T)
    kept = min(len(values), *lora_a.shape)
    return Components(q_b @ left[:, :kept], values[:kept], right[:kept] @ q_a.T)


def refactor(lora_a: Array, lora_b: Array, rank: int, *, rng: np.random.Generator) -> tuple[Array, Array]:
    """Factors of another rank: the best approximation of B·A there is, or the same product with room to grow.

    The rows of A keep their root mean square norm, so that learning rates go on to fit. A component that is added has a
    random row of that norm in A and a column of zeros in B: the model does not jump. So has one without energy, like
    all of them before B has moved: its row is the old one.

    Args:
        lora_a: Shape (r, in), float32.
        lora_b: Shape (out, r), float32.
        rank: Wanted, at least 1.
        rng: For the rows that are added.

    Returns:
        A (rank, in) and B (out, rank), float32.
    """
    return written_anew(components(lora_a, lora_b), lora_a, rank, rng=rng)


def written_anew(found: Components, lora_a: Array, rank: int, *, rng: np.random.Generator) -> tuple[Array, Array]:
    """Factors of the components with most energy; see :func:`refactor`.

    Args:
        found: What the module is to be.
        lora_a: Rows of the module before, shape (r, in): their norm is kept, and those where no energy is stay.
        rank: Wanted, at least 1.
        rng: For the rows that are added.

    Returns:
        A (rank, in) and B (out, rank), float32.
    """
    size = float(np.sqrt(np.mean(np.sum(np.square(lora_a, dtype=np.float64), axis=1))))
    living = int(np.sum(found.values > found.values[0] * 1e-7)) if found.values[0] > 0 else 0
    kept = min(rank, living)
    a = np.zeros((rank, lora_a.shape[1]))
    b = np.zeros((len(found.left), rank))
    a[:kept] = size * found.right[:kept]
    b[:, :kept] = found.left[:, :kept] * found.values[:kept] / size if kept else 0.0
    spare = lora_a[living:].astype(np.float64)[: rank - kept]
    a[kept : kept + len(spare)] = spare
    added = rank - kept - len(spare)
    if added:
        rows = rng.normal(size=(added, lora_a.shape[1]))
        a[rank - added :] = size * rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return a.astype(np.float32), b.astype(np.float32)


def module_energies(manifest: Manifest, tensors: Mapping[str, Array]) -> dict[str, tuple[float, ...]]:
    """Singular values of what every module adds to its layer, s·B·A, falling; as many as the module has components."""
    found = {}
    for name in manifest.module_names:
        lora_a, lora_b = _factors(tensors, name)
        values = [float(manifest.scale * value) for value in components(lora_a, lora_b).values]
        found[name] = (*values, *[0.0] * (len(lora_a) - len(values)))  # a layer may be smaller than the rank
    return found


def module_movement(manifest: Manifest, before: Mapping[str, Array], after: Mapping[str, Array]) -> dict[str, float]:
    """‖Δ(s·B·A)‖ (Frobenius) of every module between two adapters; the (out, in) matrices are never formed."""
    found = {}
    for name in manifest.module_names:
        (old_a, old_b), (new_a, new_b) = _factors(before, name), _factors(after, name)
        if np.array_equal(old_a, new_a) and np.array_equal(old_b, new_b):
            found[name] = 0.0
            continue
        stacked = np.concatenate([new_a, -old_a]), np.concatenate([new_b, old_b], axis=1)
        found[name] = float(manifest.scale * np.linalg.norm(components(*stacked).values))
    return found


def component_movement(
    manifest: Manifest, before: Mapping[str, Array], after: Mapping[str, Array]
) -> dict[str, tuple[float, ...]]:
    """‖Δ(s·b_j·a_j)‖ (Frobenius) of every component of the modules that moved, in four significant digits.

    Where one factor moved that is s times the norm of its change times the norm of the other factor's row or column.
    """
    found = {}
    for name in manifest.module_names:
        (old_a, old_b), (new_a, new_b) = (
            tuple(factor.astype(np.float64) for factor in _factors(tensors, name)) for tensors in (before, after)
        )
        delta_a, delta_b = new_a - old_a, new_b - old_b
        if not (delta_a.any() or delta_b.any()):
            continue
        # Δ(b·a) = Δb·a' + b·Δa: nothing large is subtracted, and where one factor stayed one term is left.
        squares = (
            np.sum(delta_b**2, axis=0) * np.sum(new_a**2, axis=1)
            + np.sum(old_b**2, axis=0) * np.sum(delta_a**2, axis=1)
            + 2 * np.sum(delta_b * old_b, axis=0) * np.sum(delta_a * new_a, axis=1)
        )
        norms = manifest.scale * np.sqrt(np.maximum(squares, 0.0))
        found[name] = tuple(float(f"{norm:.4g}") for norm in norms)
    return found


def with_ranks(
    manifest: Manifest, tensors: Mapping[str, Array], ranks: Mapping[str, int], *, seed: Sequence[int]
) -> dict[str, Array]:
    """The adapter at other ranks; a module that keeps its rank keeps its factors bit for bit.

    Args:
        manifest: The bundle's.
        tensors: The adapter.
        ranks: Of every module.
        seed: For the rows that are added; each module draws from a generator of its own.
    """
    changed = dict(tensors)
    for number, name in enumerate(manifest.module_names):
        lora_a, lora_b = _factors(tensors, name)
        if ranks[name] != len(lora_a):
            rng = np.random.default_rng([*seed, number])
            factors = refactor(lora_a, lora_b, ranks[name], rng=rng)
            changed[f"{name}.lora_a"], changed[f"{name}.lora_b"] = factors
    return changed


def _factors(tensors: Mapping[str, Array], module: str) -> tuple[Array, Array]:
    return tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
