"""Evaluates a peft adapter with torch and peft alone: the opinion that the devices' engine is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from edge_runtime.bundle import Task, Text
from export.adapters import read_labels
from export.api import Evaluation
from export.errors import AdapterError, DataError
from export.quiet import quiet
from export.records import read_records
from export.sources import ADAPTER_CONFIG, find_source, load
from export.text import encode, plain_tokenizer, text_info

_BATCH = 16
_IGNORED = -100  # cross_entropy's own mark for a position without a target


def evaluate(model: str, adapter: Path, data: Path, *, max_tokens: int, task: Task | None = None) -> Evaluation:
    """See :func:`export.api.evaluate_adapter`."""
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise AdapterError(f"adapter {adapter}: expected a peft folder with {ADAPTER_CONFIG}, got none")
    labels = read_labels(adapter)
    task = task or ("classify" if labels else "lm")
    if task == "classify" and not labels:
        raise AdapterError(f"adapter {adapter}: task classify needs labels.json, a list of the labels")
    loaded = load(find_source(model), task, len(labels or ()))
    try:
        with quiet():
            wrapped = PeftModel.from_pretrained(loaded.model, adapter, local_files_only=True).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(f"adapter {adapter}: peft cannot load it on {loaded.source.name}: {line}") from error
    text = text_info(loaded.tokenizer, loaded.model.config, task, max_tokens)
    examples = list(_examples(data, plain_tokenizer(loaded.tokenizer), text, labels))
    if not examples:
        raise DataError(f"{data}: expected records, got none")
    measure = _classes if task == "classify" else _tokens
    return measure(wrapped, examples, text.pad_id)


def _examples(
    data: Path, tokenizer: Any, text: Text, labels: tuple[str, ...] | None
) -> Iterator[tuple[list[int], int]]:
    """Token ids and class id (0 without labels) of every record."""
    for number, record in enumerate(read_records(data), start=1):
        content, label = record.get("text"), record.get("label")
        if not isinstance(content, str):
            raise DataError(f"{data}: record {number}: expected a text `text`, got {content!r}")
        if labels is not None and label not in labels:
            raise DataError(f"{data}: record {number}: unknown label {label!r}")
        task: Task = "classify" if labels is not None else "lm"
        yield encode(tokenizer, text, content, task=task), labels.index(str(label)) if labels is not None else 0


def _batches(examples: Sequence[tuple[list[int], int]], pad_id: int) -> Iterator[tuple[Any, Any, Any]]:
    """Ids and mask (batch, seq), padded on the right, and classes (batch,)."""
    for start in range(0, len(examples), _BATCH):
        chunk = examples[start : start + _BATCH]
        longest = max(len(ids) for ids, _ in chunk)
        ids = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in chunk])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in chunk])
        yield ids, mask, torch.tensor([label for _, label in chunk])


@torch.no_grad()
def _classes(model: Any, examples: Sequence[tuple[list[int], int]], pad_id: int) -> Evaluation:
    loss, correct = 0.0, 0
    for ids, mask, classes in _batches(examples, pad_id):
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss += float(cross_entropy(logits, classes, reduction="sum"))
        correct += int((logits.argmax(dim=1) == classes).sum())
    return Evaluation("accuracy", correct / len(examples), loss / len(examples), len(examples))


@torch.no_grad()
def _tokens(model: Any, examples: Sequence[tuple[list[int], int]], pad_id: int) -> Evaluation:
    loss, tokens = 0.0, 0
    for ids, mask, _ in _batches(examples, pad_id):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, _IGNORED)
        loss += float(cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=_IGNORED, reduction="sum"))
        tokens += int((targets != _IGNORED).sum())
    if not tokens:
        raise DataError("data: expected texts of two or more tokens, got none")
    mean = loss / tokens
    return Evaluation("loss", mean, mean, tokens)
