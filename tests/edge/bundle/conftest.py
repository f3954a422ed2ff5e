"""A small bundle: two blocks of one kind with two slots each, and a trained classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.bundle import (
    Array,
    FileEntry,
    Manifest,
    adapter_shapes,
    encode_manifest,
    write_tensors,
)
from tests.edge.tiny_manifest import FILES, tiny_manifest

MakeAdapter = Callable[[Mapping[str, int]], dict[str, Array]]


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    return tiny_manifest()


@pytest.fixture(scope="session")
def make_adapter(manifest: Manifest) -> MakeAdapter:
    """Random tensors of an adapter with these ranks, float32."""

    def make(ranks: Mapping[str, int]) -> dict[str, Array]:
        rng = np.random.default_rng(0)
        shapes = adapter_shapes(manifest, ranks)
        return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}

    return make


@pytest.fixture
def bundle_folder(tmp_path: Path, manifest: Manifest, make_adapter: MakeAdapter) -> Path:
    """The bundle on disk, every digest right."""
    folder = tmp_path / "bundle"
    (folder / "graphs").mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    write_tensors(folder / "weights.safetensors", {"encoder.0.attention.query.weight": np.ones((4, 6), np.float32)})
    write_tensors(folder / "adapter.safetensors", make_adapter(dict.fromkeys(manifest.module_names, 4)))
    contents = {name: (folder / name).read_bytes() for name in manifest.files}
    entries = {name: FileEntry(hashlib.sha256(data).hexdigest(), len(data)) for name, data in contents.items()}
    (folder / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=entries)))
    return folder
