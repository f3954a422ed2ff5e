"""The mean of what the devices' products B_k·A_k are, where both factors were trained.

Σ p_k·B_k·A_k is the product of the stacked factors [B_1 … B_K] and [p_1·A_1; …; p_K·A_K]. Two thin QR decompositions
and the SVD of their small core give its singular components (FLoRA, arXiv 2409.05976, stacks; FlexLoRA, arXiv
2402.11505, cuts by SVD). It is cut to the module's rank; up to there nothing is lost but rounding in float64.

Updates come one at a time. A module is held as its stacked factors while these are smaller than its (out, in) matrix,
and as that matrix from then on. So besides one update and the adapter, memory is at most the sum over the modules of
8·min(R·(out + in), out·in) bytes, where R is the sum of the devices' ranks: it does not grow without end with devices.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cloud.aggregate.apply import moved
from cloud.aggregate.factors import Components, components, written_anew
from edge_runtime.bundle import Array
from edge_runtime.wire import Layout

Double = npt.NDArray[np.float64]


class ProductMean:
    """Sum of p_k·B_k·A_k of every module of which both factors are trained.

    Sums of floating-point numbers depend on their order: for the same result, add the updates in the same order.
    """

    def __init__(self, adapter: Mapping[str, Array], layout: Layout) -> None:
        """An empty sum.

        Args:
            adapter: That the round started from, float32 by tensor name.
            layout: Of the updates.
        """
        self._adapter = adapter
        self._layout = layout
        alive = {name for name, _ in layout.blocks}
        modules = [name.removesuffix(".lora_a") for name, _ in layout.blocks if name.endswith(".lora_a")]
        self._sums = {name: _Product() for name in modules if f"{name}.lora_b" in alive}

    def add(self, values: npt.NDArray[np.float32], share: float) -> None:
        """Add one device.

        Args:
            values: Its change, shape (layout.count,), checked.
            share: p_k, its part of all weight; those of all devices add up to 1.
        """
        changes = self._layout.split(values)
        for module, total in self._sums.items():
            names = f"{module}.lora_a", f"{module}.lora_b"
            lora_a, lora_b = (moved(self._adapter, self._layout, name, changes[name]) for name in names)
            total.add(share * lora_a, lora_b)

    def factors(self) -> dict[str, Array]:
        """The best factors of each module's rank, float32 by tensor name; rows of A keep their norm of the start."""
        found = {}
        rng = np.random.default_rng(0)  # never drawn from: no module grows
        for module, total in self._sums.items():
            before = self._adapter[f"{module}.lora_a"]
            lora_a, lora_b = written_anew(total.components(), before, len(before), rng=rng)
            found[f"{module}.lora_a"], found[f"{module}.lora_b"] = lora_a, lora_b
        return found


class _Product:
    """A sum of products B·A, as stacked factors or, where that is smaller, as a matrix."""

    def __init__(self) -> None:
        self._a: list[Double] = []  # (r, in) each
        self._b: list[Double] = []  # (out, r) each
        self._matrix: Double | None = None  # (out, in)

    def add(self, lora_a: Double, lora_b: Double) -> None:
        if self._matrix is not None:
            self._matrix += lora_b @ lora_a
            return
        self._a.append(lora_a)
        self._b.append(lora_b)
        inside, outside = lora_a.shape[1], len(lora_b)
        if sum(map(len, self._a)) * (inside + outside) >= inside * outside:
            self._matrix = np.concatenate(self._b, axis=1) @ np.concatenate(self._a)
            self._a, self._b = [], []

    def components(self) -> Components:
        if self._matrix is None:
            return components(np.concatenate(self._a), np.concatenate(self._b, axis=1))
        return Components(*np.linalg.svd(self._matrix, full_matrices=False))
