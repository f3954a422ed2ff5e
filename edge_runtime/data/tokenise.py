"""Records to token ids and to the places in them that are trained.

The ids of an example are ``prefix_ids + encode(text) + suffix_ids``. Two texts of one example that differ in being
trained are encoded apart, so that no token stands across the border between what is given and what is learned; that is
also the border at which a model continues a prompt. Special tokens written out in a text are read as such, as the
original tokenizer does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edge_runtime.bundle import Chat, Task, Text
from edge_runtime.data.errors import EncoderError
from edge_runtime.data.records import (
    ASSISTANT,
    SYSTEM,
    Accepted,
    Conversation,
    LabelledText,
    PlainText,
    PromptCompletion,
    Purpose,
    Record,
)

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

UNLABELLED = -1  # the label index of a text that is only to be classified


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One tokenised record.

    Attributes:
        ids: Token ids, shape (n,), int32, n ≥ 1.
        targets: classify: the label's index, or :data:`UNLABELLED`. lm: which tokens are trained, shape (n,), bool;
            token i is predicted at position i-1, so ``targets[0]`` is False.
        truncated: Whether tokens were cut off to keep within the limit.
    """

    ids: Ids
    targets: int | Mask
    truncated: bool

    @property
    def rows(self) -> Indices:
        """Positions whose hidden state goes to the head, shape (k,)."""
        if isinstance(self.targets, int):
            return np.zeros(1, np.int64)
        return np.flatnonzero(self.targets) - 1

    @property
    def labels(self) -> Indices:
        """The class id at each of ``rows``, shape (k,): the label, or the next token."""
        if isinstance(self.targets, int):
            return np.array([self.targets], np.int64)
        return self.ids[self.targets].astype(np.int64)

    @property
    def weight(self) -> int:
        """1 for classify, the number of trained tokens for lm; always ``len(rows)``."""
        return 1 if isinstance(self.targets, int) else int(np.count_nonzero(self.targets))


class _Span(NamedTuple):
    """A stretch of text that is wholly trained or wholly given."""

    text: str
    trained: bool


class TextEncoder:
    """A bundle's way from a record to an :class:`Example`.

    Attributes:
        task: classify or lm.
        labels: Label names; the index is the class id. Empty for lm.
        max_tokens: No example is longer.
        pad_id: The id that fills a batch.
    """

    def __init__(
        self,
        tokenizer_file: Path,
        text: Text,
        *,
        task: Task,
        labels: Sequence[str] = (),
        max_tokens: int | None = None,
    ) -> None:
        """Load the tokenizer.

        Args:
            tokenizer_file: The bundle's ``tokenizer.json``; padding and truncation stored in it are switched off.
            text: The manifest's ``text``.
            task: The manifest's ``task``.
            labels: The manifest's ``labels``.
            max_tokens: A limit below the bundle's own, in tokens; None keeps the bundle's.

        Raises:
            EncoderError: the file is no tokenizer, an id of ``text`` is outside the vocabulary, or the limit is above
                the bundle's or leaves no room for text.
        """
        self.task = task
        self.labels = tuple(labels)
        self.max_tokens = text.max_tokens if max_tokens is None else max_tokens
        self.pad_id = text.pad_id
        self._class_ids = {label: index for index, label in enumerate(self.labels)}
        self._text = text
        self._prefix = np.array(text.prefix_ids, np.int32)
        self._suffix = np.array(text.suffix_ids, np.int32)
        self._check_limits()
        self._tokenizer = _load_tokenizer(tokenizer_file)

    def _check_limits(self) -> None:
        text = self._text
        fixed = len(self._prefix) + (len(self._suffix) if self.task == "classify" else 0)
        smallest = max(fixed + 1, 2 if self.task == "lm" else 1)
        if not smallest <= self.max_tokens <= text.max_tokens:
            expected = f"from {smallest} to the bundle's {text.max_tokens}"
            raise EncoderError(f"max_tokens: out of range: expected {expected}, got {self.max_tokens}")
        for token in (text.pad_id, *text.prefix_ids, *text.suffix_ids):
            self._check_id(token)

    def _check_id(self, token: int) -> None:
        size = self._text.vocab_size
        if not 0 <= token < size:
            raise EncoderError(f"token id: outside the model's vocabulary: expected below {size}, got {token}")

    def accepted(self, purpose: Purpose) -> Accepted:
        """The records this encoder can use for a purpose."""
        chat = self._text.chat
        roles = None if chat is None else frozenset(chat.roles)
        return Accepted(self.task, purpose, frozenset(self.labels), roles)

    def encode(self, records: Sequence[Record]) -> list[Example | None]:
        """Tokenise records, all in one call of the tokenizer.

        classify: tokens are cut off the end of the text; the suffix, for example ``[SEP]``, stays.

        lm, text and messages: tokens are cut off the end, the suffix first. Of a text everything but the prefix is
        trained; of a conversation, what the assistant says and the template's text after it. A conversation gets the
        prefix and the suffix only where the template's own text does not already begin or end with them.

        lm, prompt and completion: the completion and the suffix are trained. When both do not fit, the completion may
        take what the prompt leaves, or half of ``max_tokens`` (rounded up) if that is more. The prompt keeps its end,
        as much as then fits after the prefix; the completion keeps its beginning.

        Args:
            records: Records as :func:`parse_record` makes them for :meth:`accepted`.

        Returns:
            One entry a record, in order; None where nothing is left to train on (classify: no token at all).

        Raises:
            EncoderError: the tokenizer made an id outside the model's vocabulary.
        """
        spans = [_spans(record, self.task, self._text.chat) for record in records]
        encodings = self._tokenizer.encode_batch([s.text for each in spans for s in each], add_special_tokens=False)
        ids = (np.array(encoding.ids, np.int32) for encoding in encodings)
        examples = []
        for record, each in zip(records, spans, strict=True):
            parts = [(next(ids), span.trained) for span in each]
            examples.append(self._example(record, parts))
        return examples

    def _example(self, record: Record, parts: list[tuple[Ids, bool]]) -> Example | None:
        for part, _ in parts:
            if len(part):
                self._check_id(int(part.max()))
        if self.task == "classify":
            return self._classified(record, parts[0][0])
        if isinstance(record, PromptCompletion):
            return self._prompted(parts[0][0], parts[1][0])
        return self._running(parts, dedupe=isinstance(record, Conversation))

    def _classified(self, record: Record, body: Ids) -> Example | None:
        room = self.max_tokens - len(self._prefix) - len(self._suffix)
        ids = np.concatenate([self._prefix, body[:room], self._suffix])
        label = self._class_ids[record.label] if isinstance(record, LabelledText) else UNLABELLED
        return Example(ids, label, len(body) > room) if len(ids) else None

    def _prompted(self, prompt: Ids, completion: Ids) -> Example | None:
        completion = np.concatenate([completion, self._suffix])
        room = self.max_tokens - len(self._prefix)
        half = min(room, (self.max_tokens + 1) // 2)
        taken = min(len(completion), max(room - len(prompt), half))
        kept = min(len(prompt), room - taken)
        parts = [(self._prefix, False), (prompt[len(prompt) - kept :], False), (completion[:taken], True)]
        return _joined(parts, self.max_tokens, cut=kept < len(prompt) or taken < len(completion))

    def _running(self, parts: list[tuple[Ids, bool]], *, dedupe: bool) -> Example | None:
        """A text or a conversation: everything in order, cut at the end; ``dedupe`` adds no prefix or suffix twice."""
        body = np.concatenate([part for part, _ in parts])
        prefix, suffix = self._prefix, self._suffix
        if dedupe and np.array_equal(body[: len(prefix)], prefix):
            prefix = prefix[:0]
        if dedupe and np.array_equal(body[len(body) - len(suffix) :], suffix):
            suffix = suffix[:0]
        return _joined([(prefix, False), *parts, (suffix, parts[-1][1])], self.max_tokens, cut=False)


def _joined(parts: list[tuple[Ids, bool]], max_tokens: int, *, cut: bool) -> Example | None:
    """One example of parts that are trained or not; None when no token of the first ``max_tokens`` is trained."""
    ids = np.concatenate([part for part, _ in parts])
    trained = np.concatenate([np.full(len(part), flag) for part, flag in parts])[:max_tokens]
    trained[:1] = False  # nothing stands before it that could predict it
    return Example(ids[:max_tokens], trained, cut or len(ids) > max_tokens) if trained.any() else None


def _spans(record: Record, task: Task, chat: Chat | None) -> list[_Span]:
    """The texts of a record in order, at least one; neighbours alike in being trained are one text."""
    if isinstance(record, LabelledText | PlainText):
        return [_Span(record.text, task == "lm")]
    if isinstance(record, PromptCompletion):
        return [_Span(record.prompt, False), _Span(record.completion, True)]
    if chat is None:
        raise EncoderError("conversation: no chat template: expected one in the bundle, got none")
    spans = [_Span("", False) if record.messages[0].role == SYSTEM else _Span(chat.preamble, False)]
    for message in record.messages:
        role = chat.roles[message.role]
        answer = message.role == ASSISTANT
        spans += [_Span(role.before, False), _Span(message.content + role.after, answer)]
    merged = [
        _Span("".join(span.text for span in group), trained)
        for trained, group in groupby(spans, key=attrgetter("trained"))
    ]
    return [span for span in merged if span.text]


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        data = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EncoderError(f"{path}: cannot be read: expected a tokenizer.json, got: {error}") from error
    try:
        tokenizer = Tokenizer.from_str(data)
    except Exception as error:  # tokenizers raises bare Exception for every defect of the file
        raise EncoderError(f"{path}: not a tokenizer: expected a tokenizer.json, got: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
