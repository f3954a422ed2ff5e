"""What a device must know to turn text into token ids as the model expects them."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from edge_runtime.bundle import Task, Text
from export.chat import find_chat
from export.errors import ModelError

_SAMPLES = ("The quick brown fox", "a", "Water boils at 100 degrees.")


def plain_tokenizer(tokenizer: Any) -> Any:
    """A copy of the tokenizer without padding and truncation, which devices would otherwise apply from the file."""
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    return plain


def text_info(loaded_tokenizer: Any, config: Any, task: Task, max_tokens: int) -> Text:
    """Special tokens, limits and the chat form of a model.

    Args:
        loaded_tokenizer: The transformers tokenizer.
        config: The model's configuration.
        task: ``classify`` keeps the tokenizer's own frame ([CLS] … [SEP]); ``lm`` ends texts with the end token.
        max_tokens: Cap; the model's number of positions wins where it is lower.

    Raises:
        ModelError: the tokenizer puts special tokens inside the text, or more than ``max_tokens`` around it.
    """
    prefix, suffix = _frame(plain_tokenizer(loaded_tokenizer))
    end = loaded_tokenizer.eos_token_id
    if task == "lm" and end is not None and not suffix:
        suffix = (end,)
    limit = min(max_tokens, getattr(config, "max_position_embeddings", None) or max_tokens)
    if limit <= len(prefix) + len(suffix):
        raise ModelError(f"max tokens: expected more than {len(prefix) + len(suffix)} special tokens, got {limit}")
    pads = (loaded_tokenizer.pad_token_id, config.pad_token_id, end, 0)
    return Text(
        max_tokens=limit,
        vocab_size=config.vocab_size,
        pad_id=next(pad for pad in pads if pad is not None),
        prefix_ids=prefix,
        suffix_ids=suffix,
        chat=find_chat(loaded_tokenizer, begins_with_bos=bool(prefix)) if task == "lm" else None,
    )


def encode(tokenizer: Any, text: Text, content: str, *, task: Task) -> list[int]:
    """Token ids of a text as a device makes them: prefix, the text, suffix, cut to ``max_tokens``.

    A classifier's suffix, for example ``[SEP]``, always stays. A language model's is cut off first: it says that the
    text ends, which a text that was cut does not.
    """
    ids = tokenizer.encode(content, add_special_tokens=False).ids
    if task == "lm":
        return [*text.prefix_ids, *ids, *text.suffix_ids][: text.max_tokens]
    room = text.max_tokens - len(text.prefix_ids) - len(text.suffix_ids)
    return [*text.prefix_ids, *ids[:room], *text.suffix_ids]


def _frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer puts before and after a text; the same for every sample."""
    frames = set()
    for sample in _SAMPLES:
        bare = tokenizer.encode(sample, add_special_tokens=False).ids
        full = tokenizer.encode(sample, add_special_tokens=True).ids
        start = next((at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare), None)
        if start is None:
            raise ModelError("tokenizer: expected special tokens only before and after the text, got others")
        frames.add((tuple(full[:start]), tuple(full[start + len(bare) :])))
    if len(frames) != 1:
        raise ModelError("tokenizer: its special tokens depend on the text")
    return frames.pop()
