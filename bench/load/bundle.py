"""A bundle that an aggregator can serve and whose updates have a given size. Its graphs are placeholders: an aggregator
never loads them, and no device of this benchmark trains."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.bundle import (
    Block,
    BlockKind,
    Bundle,
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
    file_entry,
    open_bundle,
    write_tensors,
)

RANK = 64
_INSIDE = 64  # input features: A is never sent here, so it may be small
_PLACEHOLDERS = ("graphs/embed.onnx", "graphs/block.onnx", "graphs/head.onnx", "tokenizer.json")


def make_bundle(folder: Path, *, update_bytes: int) -> Bundle:
    """A bundle of one module whose factor B has ``update_bytes`` bytes as float32, a multiple of 256."""
    (folder / "graphs").mkdir(parents=True)
    for name in _PLACEHOLDERS:
        (folder / name).write_bytes(b"{}")
    write_tensors(folder / "weights.safetensors", {"w": np.zeros((1, 1), np.float32)})
    outside = update_bytes // (4 * RANK)
    slot = Slot("linear", _INSIDE, outside)
    manifest = Manifest(
        schema=2,
        model="load",
        task="lm",
        width=_INSIDE,
        base="fp32",
        embed=Embed(_PLACEHOLDERS[0], (), ("mask",)),
        kinds=(BlockKind("block", _PLACEHOLDERS[1], (), (slot,), ("mask",)),),
        blocks=(Block("block", "layer.0"),),
        head=Head(_PLACEHOLDERS[2], "target", (), module=None, vocabulary=Vocabulary(_PLACEHOLDERS[2], ("w",))),
        modules=(Module("layer.0.linear", 0, slot.name, slot.in_features, slot.out_features),),
        r_max=RANK,
        scale=2.0,
        text=Text(max_tokens=64, vocab_size=10, pad_id=0),
        peft=PeftInfo("load", "CAUSAL_LM", (slot.name,)),
        parameters=1,
        files={},
    )
    rng = np.random.default_rng(7)
    shapes = adapter_shapes(manifest, {"layer.0.linear": RANK})
    write_tensors(
        folder / "adapter.safetensors",
        {
            name: np.zeros(shape, np.float32) if name.endswith("lora_b") else rng.normal(size=shape).astype(np.float32)
            for name, shape in shapes.items()
        },
    )
    names = (*_PLACEHOLDERS, "weights.safetensors", "adapter.safetensors")
    entries = {name: file_entry(folder / name) for name in names}
    manifest = msgspec.structs.replace(manifest, files=entries)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return open_bundle(folder)
