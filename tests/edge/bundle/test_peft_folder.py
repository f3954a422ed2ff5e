"""What we write is an adapter to the real peft, with the effect we say: W + scale · B·A, and the trained head.

The oracle knows nothing of peft: it adds the products to the weights of a second copy of the model by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    Vocabulary,
    adapter_shapes,
    encode_manifest,
    parse_manifest,
    read_peft_folder,
    write_peft_folder,
)

pytestmark = pytest.mark.slow  # importing torch, transformers and peft; none is imported unless the test runs

SCALE = 1.5
HEAD = Head("graphs/head.onnx", "first", (), "classifier", (Param("weight", (3, 16)), Param("bias", (3,))))


def manifest_for(prefix: str, blocks: int, slots: tuple[Slot, ...], head: Head, task: str) -> Manifest:
    """A manifest that contradicts nothing; its files are not there."""
    names = ["weights.safetensors", "adapter.safetensors", "tokenizer.json", *(f"graphs/{g}.onnx" for g in "ebh")]
    manifest = Manifest(
        schema=2,
        model="tiny",
        task="classify" if task == "SEQ_CLS" else "lm",
        width=16,
        base="fp32",
        embed=Embed("graphs/e.onnx", (), ()),
        kinds=(BlockKind("layer", "graphs/b.onnx", (), slots, ()),),
        blocks=tuple(Block("layer", f"{prefix}.{index}") for index in range(blocks)),
        head=msgspec.structs.replace(head, graph="graphs/h.onnx"),
        modules=tuple(
            Module(f"{prefix}.{index}.{slot.name}", index, slot.name, slot.in_features, slot.out_features)
            for index in range(blocks)
            for slot in slots
        ),
        r_max=4,
        scale=SCALE,
        text=Text(max_tokens=16, vocab_size=50, pad_id=0),
        peft=PeftInfo("tiny", task, tuple(slot.name.rsplit(".", 1)[-1] for slot in slots)),  # type: ignore[arg-type]  # one of two
        parameters=1,
        files=dict.fromkeys(names, FileEntry("00" * 32, 0)),
        labels=("a", "b", "c") if task == "SEQ_CLS" else (),
    )
    return parse_manifest(encode_manifest(manifest))


def bert() -> tuple[Any, Manifest]:
    """Eleven layers: a pattern for layer 1 must not fit layer 10."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=11,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    slots = Slot("attention.self.query", 16, 16), Slot("attention.self.value", 16, 16)
    manifest = manifest_for("bert.encoder.layer", 11, slots, HEAD, "SEQ_CLS")
    return transformers.BertForSequenceClassification(config), manifest


def llama() -> tuple[Any, Manifest]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    slots = Slot("self_attn.q_proj", 16, 16), Slot("self_attn.v_proj", 16, 8), Slot("mlp.down_proj", 24, 16)
    head = Head("graphs/h.onnx", "target", (), vocabulary=Vocabulary("graphs/h.onnx", ("w",)))
    return transformers.LlamaForCausalLM(config), manifest_for(
        "model.layers",
        2,
        slots,
        head,
        "CAUSAL_LM",
    )


def logits(model: Any) -> Array:
    torch = pytest.importorskip("torch")
    ids = torch.arange(12).reshape(2, 6) * 4
    with torch.no_grad():
        result: Array = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
    return result


def by_hand(base: Any, manifest: Manifest, adapter: Mapping[str, Array]) -> Any:
    """A copy of the model with the adapter added to its weights."""
    torch = pytest.importorskip("torch")
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name in manifest.module_names:
            product = adapter[f"{name}.lora_b"].astype(np.float64) @ adapter[f"{name}.lora_a"].astype(np.float64)
            model.get_submodule(name).weight += torch.from_numpy((SCALE * product).astype(np.float32))
        for param in manifest.head.params:
            name = f"{manifest.head.module}.{param.name}"
            model.get_parameter(name).copy_(torch.from_numpy(adapter[name]))
    return model


@pytest.mark.needs_torch("peft computes with the folder that was written here")
@pytest.mark.parametrize("make", [bert, llama])
def test_peft_computes_what_we_mean(tmp_path: Path, make: Any) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    base, manifest = make()
    ranks = {name: 1 + index % 4 for index, name in enumerate(manifest.module_names)}
    rng = np.random.default_rng(1)
    shapes = adapter_shapes(manifest, ranks)
    adapter = {name: rng.standard_normal(shape, dtype=np.float32) / 2 for name, shape in shapes.items()}
    write_peft_folder(tmp_path / "ours", manifest, adapter)

    expected = logits(by_hand(base, manifest, adapter))
    untouched = logits(base)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    found = logits(model)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - untouched).max() > 0.1, "an adapter without effect would prove nothing"

    # And back: what peft saves of it is the same adapter to us.
    model.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)  # else it asks the network
    read = read_peft_folder(tmp_path / "theirs", manifest)
    assert read.keys() == adapter.keys()
    for name, array in adapter.items():
        np.testing.assert_array_equal(read[name], array)
