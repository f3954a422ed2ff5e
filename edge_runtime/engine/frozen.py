"""Frozen weights of the blocks as graph inputs: mapped from the bundle's file, shared by all sessions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edge_runtime.bundle import (
    WEIGHTS_FILE,
    Array,
    BundleError,
    Manifest,
    file_offset,
    int8_products,
    release_pages,
)
from edge_runtime.engine.block import OrtValues, Packed
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.graph import InFile
from edge_runtime.engine.saturation import saturates


class FrozenWeights:
    """What every block of a bundle reads beside the adapter."""

    def __init__(self, manifest: Manifest, weights: Mapping[str, Array], *, resident: bool) -> None:
        """Nothing is read from the file yet.

        Args:
            manifest: The bundle's.
            weights: Its mapped weights by name.
            resident: Whether pages may stay in memory after a block was used.
        """
        self._manifest = manifest
        self._weights = weights
        self._resident = resident
        self._names = [
            {f"w:{name}": f"{block.prefix}.{name}" for name in manifest.kind_of(index).weights}
            for index, block in enumerate(manifest.blocks)
        ]
        self._mapped = [bind(weights, names) for names in self._names]
        self._int8: dict[int, OrtValues] = {}

    def exact(self, block: int) -> OrtValues:
        """Inputs ``w:{weight}`` as stored; no copies."""
        return self._mapped[block]

    def int8(self, block: int) -> OrtValues:
        """Inputs ``q:``, ``qt:`` and ``qs:{weight}`` for int8 products, and the exact ones.

        Made at the first use and kept: one copy of the weights in int8, two where the bundle does not store int8 or
        the processor wants them narrower.

        Raises:
            EngineInputError: a weight is stored in a form that has no int8 products.
        """
        if block not in self._int8:
            kind, prefix = self._manifest.kind_of(block), self._manifest.blocks[block].prefix
            assert kind.fast is not None  # the engine has refused such a bundle
            made = dict(self._mapped[block])
            for name in kind.fast.weights:
                try:
                    parts = int8_products(f"{prefix}.{name}", self._weights, narrow=saturates())
                except BundleError as error:
                    raise EngineInputError(f"int8 products: {error}") from error
                made |= {f"{part}:{name}": ort.OrtValue.ortvalue_from_numpy(array) for part, array in parts.items()}
            self._int8[block] = made
            self.used(block)
        return self._int8[block]

    def packed(self, block: int, folder: Path) -> Packed | None:
        """The block's weights for sessions of its own, from a bundle's folder; None where they are not float32."""
        constants = {}
        for key, name in self._names[block].items():
            array, offset = self._weights[name], file_offset(self._weights[name])
            if array.dtype != np.float32 or offset is None:
                return None
            constants[key] = InFile(WEIGHTS_FILE, offset, array.shape)
        return Packed(folder, constants)

    def block_bytes(self, block: int) -> int:
        """Size of the block's weights as stored."""
        return sum(self._weights[name].nbytes for name in self._names[block].values())

    def used(self, block: int) -> None:
        """Give the block's mapped pages back to the system, unless they may stay."""
        if not self._resident:
            for name in self._names[block].values():
                release_pages(self._weights[name])


def bind(weights: Mapping[str, Array], names: Mapping[str, str]) -> OrtValues:
    """Graph inputs over mapped weights: the OrtValue shares the array's memory.

    Args:
        weights: By name.
        names: Name of the weight by graph input.

    Raises:
        EngineInputError: a weight is missing.
    """
    missing = [name for name in names.values() if name not in weights]
    if missing:
        raise EngineInputError(f"weights: no tensor {missing[0]} ({len(missing)} missing)")
    return {key: ort.OrtValue.ortvalue_from_numpy(weights[name]) for key, name in names.items()}
