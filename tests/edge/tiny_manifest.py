"""The manifest of a small bundle: two blocks of one kind with two slots each, and a trained classifier."""

from __future__ import annotations

import hashlib

from edge_runtime.bundle import (
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
)

FILES = {
    "graphs/embed.onnx": b"embed",
    "graphs/block.onnx": b"block",
    "graphs/head.onnx": b"head",
    "tokenizer.json": b"{}",
}
SLOTS = (Slot("attention.query", 6, 4), Slot("output", 8, 6))
PREFIXES = ("encoder.0", "encoder.1")


def tiny_manifest() -> Manifest:
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
