"""A Llama with random weights and a word-level tokenizer, as a Hugging Face folder: figures do not depend on values."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 49_152


def write_llama(folder: Path, *, layers: int, width: int = 576, vocabulary: int = VOCABULARY) -> None:
    """Write the model; with 30 layers and the default sizes it has the shape of SmolLM2-135M.

    Args:
        folder: Where to.
        layers: Blocks.
        width: Of the hidden state, a multiple of 18: nine query heads, three for keys and values.
        vocabulary: Rows of the embedding, which is the output projection too.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from export.quiet import quiet

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2_048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    with quiet():
        LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "[UNK]": 2, **{f"word{i}": 3 + i for i in range(50)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
