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
    Block,
    BlockKind,
    Embed,
    FileEntry,
    Head,
    Manifest,
    Module,
    Param,
    PeftInfo,
    Slot,
    Text,
    adapter_shapes,
    encode_manifest,
    write_tensors,
)

FILES = {
    "graphs/embed.onnx": b"embed",
    "graphs/block.onnx": b"block",
    "graphs/head.onnx": b"head",
    "tokenizer.json": b"{}",
}
SLOTS = (Slot("attention.query", 6, 4), Slot("output", 8, 6))
PREFIXES = ("encoder.0", "encoder.1")

MakeAdapter = Callable[[Mapping[str, int]], dict[str, Array]]


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """Its files have the digests of empty ones."""
    nothing = FileEntry(hashlib.sha256(b"").hexdigest(), 0)
    return Manifest(
        schema=2,
        model="tiny",
        task="classify",
        width=6,
        base="fp32",
        embed=Embed("graphs/embed.onnx", ("embeddings.weight",), ("mask",)),
        kinds=(BlockKind("layer", "graphs/block.onnx", ("attention.query.weight",), SLOTS, ("mask",)),),
        blocks=tuple(Block("layer", prefix) for prefix in PREFIXES),
        head=Head("graphs/head.onnx", "first", (), "classifier", (Param("weight", (3, 6)), Param("bias", (3,)))),
        modules=tuple(
            Module(f"{prefix}.{slot.name}", block, slot.name, slot.in_features, slot.out_features)
            for block, prefix in enumerate(PREFIXES)
            for slot in SLOTS
        ),
        r_max=4,
        scale=2.0,
        text=Text(max_tokens=16, vocab_size=50, pad_id=0),
        peft=PeftInfo("org/tiny", "SEQ_CLS", ("output", "attention.query")),
        parameters=1000,
        files=dict.fromkeys([*FILES, "weights.safetensors", "adapter.safetensors"], nothing),
        labels=("no", "yes", "maybe"),
    )


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
