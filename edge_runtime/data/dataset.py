"""Files of local records to a dataset in memory, with an account of everything that was left out.

Records are read and tokenised in pieces of bounded size; only token ids are kept, never the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edge_runtime.bundle import Task
from edge_runtime.data.errors import BadLine, BadRecordError, DataFileError, RecordDefectError, TextError
from edge_runtime.data.files import ReadLog, read_records
from edge_runtime.data.records import LabelledText, PlainText, PromptCompletion, Purpose, Record, parse_record
from edge_runtime.data.tokenise import Example, TextEncoder

PIECE_RECORDS = 512  # enough for the tokenizer to use every core
PIECE_CHARS = 1 << 20  # the tokenizer needs some hundred bytes a token while it works
LISTED_LABELS = 8


class DatasetReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the files, in numbers that can be written as JSON.

    ``trained_tokens`` is 0 for classify. ``label_counts`` has every label of the bundle, those without an example
    too, and is empty for lm. ``bad_lines`` are the first of ``bad_count``.
    """

    files: tuple[str, ...]
    task: Task
    max_tokens: int
    examples: int
    tokens: int
    trained_tokens: int
    truncated: int
    dropped: int  # records of which the limit left nothing to train on
    bad_count: int
    bad_lines: tuple[BadLine, ...]
    ignored_fields: tuple[str, ...]
    label_counts: dict[str, int]

    def sentences(self) -> tuple[str, ...]:
        """Lines for a person: what there is first, then everything that was left out."""
        lines = [_counted(self.examples, "example") + self._truncation()]
        if self.task == "lm":
            lines.append(f"{_counted(self.tokens, 'token')}, {self.trained_tokens:,} of them trained")
        if any(self.label_counts.values()):
            lines.append(self._labels())
        if self.dropped:
            lines.append(
                f"{_counted(self.dropped, 'example')} dropped: nothing to train on within {self.max_tokens} tokens"
            )
        if self.bad_count:
            lines.append(f"{_counted(self.bad_count, 'bad line')} skipped, the first: {self.bad_lines[0]}")
        if self.ignored_fields:
            lines.append("ignored fields: " + ", ".join(repr(name) for name in self.ignored_fields))
        return tuple(lines)

    def _truncation(self) -> str:
        return f", {self.truncated:,} truncated at {self.max_tokens} tokens" if self.truncated else ""

    def _labels(self) -> str:
        counts = self.label_counts
        if len(counts) <= LISTED_LABELS:
            return "labels: " + ", ".join(f"{label} {count:,}" for label, count in counts.items())
        seen = [count for count in counts.values() if count]
        return f"labels: {len(seen)} of {len(counts)} have examples, from {min(seen):,} to {max(seen):,} each"


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Tokenised examples in file order, ``max_tokens`` at most each, and the report on how they came about."""

    examples: tuple[Example, ...]
    report: DatasetReport
    pad_id: int
    max_tokens: int

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def weight(self) -> int:
        """What a result of this data counts: examples for classify, trained tokens for lm; the examples' sum."""
        return sum(example.weight for example in self.examples)

    @property
    def tokens(self) -> int:
        """Of all examples, without padding."""
        return sum(len(example.ids) for example in self.examples)

    def take(self, numbers: Iterable[int]) -> Dataset:
        """These examples alone; the report is still that of the files."""
        return replace(self, examples=tuple(self.examples[number] for number in numbers))


def load_dataset(
    paths: Path | Sequence[Path], encoder: TextEncoder, *, skip_bad: bool = False, purpose: Purpose = "train"
) -> Dataset:
    """Read and tokenise local files.

    Args:
        paths: One file or several, read in this order as one dataset.
        encoder: The bundle's encoder.
        skip_bad: Train on the usable lines instead of refusing.
        purpose: "train" (also for evaluation) needs answers; "predict" takes texts without a label.

    Raises:
        DataFileError: a file is unusable as a whole, or no example is left.
        BadRecordError: there are bad lines and ``skip_bad`` is off; every file has been read by then.
        EncoderError: the tokenizer does not fit the model.
    """
    files = (paths,) if isinstance(paths, Path) else tuple(paths)
    log = ReadLog()
    accepted = encoder.accepted(purpose)
    records = (record for path in files for record in read_records(path, accepted, log))
    encoded: list[Example | None] = []
    for piece in _pieces(records):
        if skip_bad or not log.bad_count:  # once refused, the rest is only read for its bad lines
            encoded += encoder.encode(piece)
    if log.bad_count and not skip_bad:
        raise BadRecordError(log.bad_lines, log.bad_count)
    examples = tuple(example for example in encoded if example is not None)
    report = _report(files, encoder, log, examples, dropped=len(encoded) - len(examples))
    if not examples:
        names = ", ".join(report.files)
        left_out = f"{report.dropped} dropped at {encoder.max_tokens} tokens, {log.bad_count} bad lines"
        first = f", the first: {log.bad_lines[0]}" if log.bad_lines else ""
        raise DataFileError(f"{names}: no usable examples: expected at least one, got {left_out}{first}")
    return Dataset(examples, report, encoder.pad_id, encoder.max_tokens)


def dataset_of_texts(texts: Sequence[str], encoder: TextEncoder) -> Dataset:
    """Tokenise texts that are in no file, for example from a command line; example i is text i.

    Raises:
        TextError: a text is empty or holds a NUL character, or the tokenizer makes no token of it that can be used.
        EncoderError: the tokenizer does not fit the model.
    """
    accepted = encoder.accepted("predict")
    records = []
    for number, text in enumerate(texts, start=1):
        try:
            records.append(parse_record({"text": text}, accepted)[0])
        except RecordDefectError as defect:
            raise TextError(f"text {number}: {defect}") from None  # the same defect, with its place
    examples = []
    for number, example in enumerate(encoder.encode(records), start=1):
        if example is None:
            raise TextError(f"text {number}: too short: expected at least one token to use, got none")
        examples.append(example)
    report = _report((), encoder, ReadLog(), examples, dropped=0)
    return Dataset(tuple(examples), report, encoder.pad_id, encoder.max_tokens)


def _pieces(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Consecutive records, as many as one call of the tokenizer should get."""
    piece: list[Record] = []
    chars = 0
    for record in records:
        piece.append(record)
        chars += _chars(record)
        if len(piece) >= PIECE_RECORDS or chars >= PIECE_CHARS:
            yield piece
            piece, chars = [], 0
    if piece:
        yield piece


def _chars(record: Record) -> int:
    if isinstance(record, LabelledText | PlainText):
        return len(record.text)
    if isinstance(record, PromptCompletion):
        return len(record.prompt) + len(record.completion)
    return sum(len(message.content) for message in record.messages)


def _report(
    files: tuple[Path, ...], encoder: TextEncoder, log: ReadLog, examples: Sequence[Example], *, dropped: int
) -> DatasetReport:
    lm = encoder.task == "lm"
    per_class = Counter(example.targets for example in examples if isinstance(example.targets, int))
    return DatasetReport(
        files=tuple(str(path) for path in files),
        task=encoder.task,
        max_tokens=encoder.max_tokens,
        examples=len(examples),
        tokens=sum(len(example.ids) for example in examples),
        trained_tokens=sum(example.weight for example in examples) if lm else 0,
        truncated=sum(example.truncated for example in examples),
        dropped=dropped,
        bad_count=log.bad_count,
        bad_lines=tuple(log.bad_lines),
        ignored_fields=tuple(log.ignored_fields),
        label_counts={} if lm else {name: per_class[index] for index, name in enumerate(encoder.labels)},
    )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
