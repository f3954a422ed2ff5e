"""Tiny real models, exported once a session for every test that needs a bundle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LABELS = ("asyncio", "email", "tkinter", "xml")
WORDS = [f"word{i}" for i in range(40)]


def save_tokenizer(folder: Path, *, special: dict[str, int]) -> int:
    """A word-level tokenizer with these special tokens; returns the vocabulary size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {**special, **{word: len(special) + index for index, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "[CLS]" in special:
        pairs = [(name, special[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pairs)
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    else:
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT classifier; no layer is square."""
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert")
    size = save_tokenizer(folder, special={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=len(LABELS),
        initializer_range=0.2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-layer Llama with grouped KV heads."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    size = save_tokenizer(folder, special={"<s>": 0, "</s>": 1, "[UNK]": 2})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=56,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def export(model: Path, task: str, out: Path, *more: str) -> Path:
    """Export with rank 4 on every linear layer, by the command itself.

    In a process of its own: the exporter's sessions and the engine's global thread pool exclude each other.
    """
    command = [sys.executable, "-m", "edge_runtime.cli", "export", "--model", str(model), "--task", task]
    done = subprocess.run([*command, "--rank", "4", "--out", str(out), *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def bert_bundle(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BERT's bundle: task classify, four labels, rank 4."""
    return export(bert_folder, "classify", tmp_path_factory.mktemp("bundles") / "bert", "--labels", ",".join(LABELS))


@pytest.fixture(scope="session")
def llama_bundle(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama's bundle: task lm, rank 4."""
    return export(llama_folder, "lm", tmp_path_factory.mktemp("bundles") / "llama")
