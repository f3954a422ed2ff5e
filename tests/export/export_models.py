"""Tiny random models with a tokenizer, saved as Hugging Face folders; sizes differ on purpose, so that a swap shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", "red", "green", "blue", "warm", "cold", "is", "the", "sky")
CHAT = (
    "{% if messages[0]['role'] != 'system' %}<|system|>Default.<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
)


def bert(folder: Path, *, layers: int = 2, dropout: float = 0.1, width: int = 32) -> Path:
    """A BERT encoder with a classifier of two labels."""
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        pad_token_id=0,
    )
    _save(folder, BertForSequenceClassification, config)
    _tokenizer(folder, frame=("[CLS]", "[SEP]"))
    return folder


def llama(folder: Path, *, layers: int = 3, tied: bool = True, width: int = 32) -> Path:
    """A Llama decoder with four heads in two groups, and a chat template."""
    _save(folder, LlamaForCausalLM, LlamaConfig(**_decoder(layers, width), tie_word_embeddings=tied))
    _tokenizer(folder, frame=("<s>", None), chat=CHAT)
    return folder


def qwen2(folder: Path, *, layers: int = 2) -> Path:
    """A Qwen2 decoder, whose projections have biases; its second block attends to a window of four."""
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    _save(folder, Qwen2ForCausalLM, Qwen2Config(**_decoder(layers), tie_word_embeddings=False, **window))
    _tokenizer(folder, frame=(None, None))
    return folder


def _decoder(layers: int, width: int = 32) -> dict[str, Any]:
    return {
        "vocab_size": len(WORDS),
        "hidden_size": width,
        "intermediate_size": 56,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 4,
        "eos_token_id": 5,
    }


def _save(folder: Path, kind: Any, config: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = kind(config)
        for name, value in model.named_parameters():
            if name.endswith("bias"):  # zero at first, which would hide a lost bias
                torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(folder)


def _tokenizer(folder: Path, *, frame: tuple[str | None, str | None], chat: str | None = None) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    parts = [word for word in (frame[0], "$A", frame[1]) if word]
    special = [(word, WORDS.index(word)) for word in frame if word]
    tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=special)
    tokenizer.enable_truncation(8)  # what a bundle must not hand on
    tokenizer.enable_padding(length=8)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    names |= {"bos_token": "<s>", "eos_token": "</s>"} if frame != ("[CLS]", "[SEP]") else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = chat
    fast.save_pretrained(folder)
