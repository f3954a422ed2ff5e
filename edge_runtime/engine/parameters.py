"""The adapter while it is being trained: alive parameters in one flat array, dead ones as they came.

One flat array makes the optimizer a handful of vector operations and the update a single subtraction. The engine reads
the views below, so an optimizer step is visible to the next forward pass without a copy. Only a factor of which some
components are trained has an array of its own, into which :meth:`AdapterParameters.settle` copies them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from edge_runtime.bundle import Array
from edge_runtime.wire import Layout

Flat = npt.NDArray[np.float32]


class AdapterParameters:
    """All tensors of an adapter; those of ``layout`` are views of ``flat`` in its order.

    Attributes:
        tensors: Every adapter tensor by name, float32.
        flat: Alive values, shape (layout.count,); written by the optimizer.
        origin: What is trained of the alive tensors, as it came, for the update and the proximal term; mapped tensors
            that are trained whole take no memory.
        layout: Names and shapes of what is trained.
        frozen: Names of those that are trained no longer; they stay in the layout, as they are.
    """

    def __init__(self, adapter: Mapping[str, Array], layout: Layout) -> None:
        """Copy what is trained of ``adapter`` into one array."""
        self.layout = layout
        self.frozen: frozenset[str] = frozenset()
        self.flat: Flat = np.empty(layout.count, dtype=np.float32)
        views = layout.split(self.flat)
        self.origin: dict[str, Array] = {}
        for name, view in views.items():
            self.origin[name] = np.ascontiguousarray(adapter[name][layout.where(name)])
            view[...] = self.origin[name]
        self._parts = {name: views.pop(name) for name in layout.components}
        partly = {name: np.array(adapter[name]) for name in self._parts}
        dead = {
            name: np.ascontiguousarray(array)
            for name, array in adapter.items()
            if name not in views and name not in partly
        }
        self.tensors: dict[str, Array] = {**dead, **partly, **views}

    def freeze(self, names: Collection[str]) -> None:
        """Train these tensors no longer: they keep the values they have."""
        self.frozen |= frozenset(names)

    def resume(self, values: Flat) -> None:
        """Take the values that an interrupted training left, shape (layout.count,)."""
        self.flat[:] = values
        self.settle()

    def settle(self) -> None:
        """Copy trained components from ``flat`` to where the engine reads them; a tensor trained whole needs none."""
        for name, part in self._parts.items():
            self.tensors[name][self.layout.where(name)] = part

    @property
    def alive(self) -> frozenset[str]:
        """Names of the tensors that need gradients."""
        return frozenset(name for name, _ in self.layout.blocks) - self.frozen

    def change(self) -> Flat:
        """What training has changed, shape (layout.count,)."""
        return self.change_of(self.layout)

    def change_of(self, layout: Layout) -> Flat:
        """What training has changed of the tensors of another layout, shape (layout.count,): some of those trained."""
        changed: Flat = np.empty(layout.count, dtype=np.float32)
        values = self.layout.split(self.flat)
        for name, view in layout.split(changed).items():
            np.subtract(values[name], self.origin[name], out=view)
        return changed
