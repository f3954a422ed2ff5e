"""A bundle that is right in every respect but its graphs, which no test here runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.bundle import (
    Block,
    BlockKind,
    Embed,
    Head,
    Manifest,
    Module,
    PeftInfo,
    Slot,
    Text,
    Vocabulary,
    adapter_shapes,
    encode_manifest,
    encode_tensors,
    file_entry,
    parse_manifest,
    write_tensors,
)

RANK = 4
WIDTH = 6
FEATURES = {"layers.0.up": (WIDTH, 10), "layers.1.up": (WIDTH, 10)}
MODULES = tuple(FEATURES)
PLACES = {name: number for number, name in enumerate(MODULES)}
WEIGHT_BYTES = 300_000


@dataclass(frozen=True)
class TinyBundle:
    """Its files by digest, its initial adapter, its own digest."""

    blobs: dict[str, bytes]
    adapter: bytes
    digest: str
    weights: str  # digest of the largest file

    @property
    def manifest(self) -> Manifest:
        return parse_manifest(self.blobs[self.digest])


def make_bundle(folder: Path) -> TinyBundle:
    """Write the files, name them in a manifest, and read them back as blobs."""
    rng = np.random.default_rng(3)
    shapes = {
        f"{name}.{factor}": ((RANK, WIDTH) if factor == "lora_a" else (10, RANK))
        for name in MODULES
        for factor in ("lora_a", "lora_b")
    }
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    contents = {
        "graphs/embed.onnx": b"embed",
        "graphs/block.onnx": b"block",
        "graphs/head.onnx": b"head",
        "graphs/vocabulary.onnx": b"vocabulary",
        "weights.safetensors": encode_tensors({"w": rng.normal(size=WEIGHT_BYTES // 8).astype(np.float32)}),
        "tokenizer.json": b"{}",
    }
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    # Aligned, as an export writes it: the same tensors as the task's first adapter, other bytes.
    write_tensors(folder / "adapter.safetensors", tensors)
    contents["adapter.safetensors"] = (folder / "adapter.safetensors").read_bytes()
    manifest = Manifest(
        schema=2,
        model="tiny",
        task="lm",
        width=WIDTH,
        base="fp32",
        embed=Embed("graphs/embed.onnx", (), ()),
        kinds=(BlockKind("k", "graphs/block.onnx", (), (Slot("up", WIDTH, 10),), ()),),
        blocks=(Block("k", "layers.0"), Block("k", "layers.1")),
        head=Head("graphs/head.onnx", "target", (), vocabulary=Vocabulary("graphs/vocabulary.onnx", ("w",))),
        modules=tuple(Module(name, index, "up", WIDTH, 10) for index, name in enumerate(MODULES)),
        r_max=RANK,
        scale=2.0,
        text=Text(max_tokens=8, vocab_size=9, pad_id=0),
        peft=PeftInfo("tiny", "CAUSAL_LM", ("up",)),
        parameters=1,
        files={name: file_entry(folder / name) for name in contents},
    )
    data = encode_manifest(manifest)
    assert adapter_shapes(manifest, dict.fromkeys(MODULES, RANK)) == shapes
    blobs = {hashlib.sha256(part).hexdigest(): part for part in (*contents.values(), data)}
    return TinyBundle(
        blobs=blobs,
        adapter=encode_tensors(tensors),
        digest=hashlib.sha256(data).hexdigest(),
        weights=manifest.files["weights.safetensors"].sha256,
    )
