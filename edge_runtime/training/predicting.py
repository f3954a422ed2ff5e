"""Using an adapter: classes with probabilities, or the continuation of a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer

from edge_runtime.bundle import Array
from edge_runtime.data import Batch, Dataset, dataset_of_texts, evaluation_batches
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.training.accumulate import micro_batches
from edge_runtime.training.session import WorkingBundle

_BATCH_SIZE = 32


class Classified(msgspec.Struct, frozen=True):
    """One text's most probable class; ``index`` counts the texts from 0, probabilities are fractions."""

    index: int
    label: str
    probability: float
    probabilities: dict[str, float]

    def __str__(self) -> str:
        return f"{self.index}\t{self.label}\t{self.probability:.4f}"


class Continued(msgspec.Struct, frozen=True):
    """A text and what the model says comes next."""

    text: str
    continuation: str

    def __str__(self) -> str:
        return self.text + self.continuation


Prediction = Classified | Continued


def classify(
    work: WorkingBundle, texts: tuple[str, ...], file: Path | None, *, max_tokens: int | None
) -> Iterator[Classified]:
    """Classes of texts, in the order given; the adapter is the one in use.

    Raises:
        DataError: the file, or a text, cannot be used.
    """
    labels = work.bundle.manifest.labels
    for index, row in enumerate(_probabilities(work, _dataset(work, texts, file, max_tokens))):
        best = int(row.argmax())
        shares = {label: float(share) for label, share in zip(labels, row, strict=True)}
        yield Classified(index, labels[best], float(row[best]), shares)


def _dataset(work: WorkingBundle, texts: tuple[str, ...], file: Path | None, max_tokens: int | None) -> Dataset:
    if file is None:
        return dataset_of_texts(texts, work.encoder(max_tokens))
    return work.dataset([file], max_tokens=max_tokens, skip_bad=False, purpose="predict")


def _probabilities(work: WorkingBundle, dataset: Dataset) -> Array:
    """Softmax of the logits, shape (examples, classes), float64."""
    rows = np.empty((len(dataset), len(work.bundle.manifest.labels)))
    for batch in evaluation_batches(dataset, _BATCH_SIZE):
        for part in micro_batches(batch, work.micro_tokens(None)):
            rows[part.examples] = work.engine.logits(part)
    rows = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(rows / rows.sum(axis=1, keepdims=True))


def continue_text(work: WorkingBundle, text: str, *, max_new_tokens: int) -> Continued:
    """Greedy continuation. Every token is a forward pass over the whole text, as training sees it.

    Raises:
        EngineInputError: the text is empty or leaves no room below the model's limit.
    """
    info = work.bundle.manifest.text
    tokenizer = Tokenizer.from_file(str(work.bundle.path("tokenizer.json")))
    ids = [*info.prefix_ids, *tokenizer.encode(text, add_special_tokens=False).ids]
    if not 0 < len(ids) < info.max_tokens:
        raise EngineInputError(f"--text: expected 1 to {info.max_tokens - 1} tokens, got {len(ids)}")
    new: list[int] = []
    while len(new) < max_new_tokens and len(ids) + len(new) < info.max_tokens:
        best = int(work.engine.logits(_last_row([*ids, *new]))[0].argmax())
        if best in info.suffix_ids:
            break
        new.append(best)
    return Continued(text, tokenizer.decode(new))


def _last_row(ids: list[int]) -> Batch:
    tokens = np.array([ids], dtype=np.int64)
    last = np.array([len(ids) - 1], dtype=np.int64)
    return Batch(tokens, np.ones_like(tokens), rows=last, labels=np.zeros_like(last), examples=np.zeros_like(last))
