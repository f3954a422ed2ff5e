"""What can be wrong with training data on the device.

DataError
├── DataFileError        a whole file is unusable: choose or convert another one
├── BadRecordError       some lines are: correct them, or leave them out with ``--skip-bad-lines``
├── TextError            a text handed over directly is unusable: correct it
├── EncoderError         the bundle's tokenizer, or the token limit asked for, does not fit the bundle
└── RecordDefectError    one record is malformed; becomes a bad line and never leaves this package
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

LISTED_LINES = 5  # enough to recognise the pattern, few enough for a terminal


class BadLine(msgspec.Struct, frozen=True):
    """One unusable record: its file, the physical line it begins on (from 1) and what is wrong with it."""

    file: str
    line: int
    problem: str  # "what happened: expected X, got Y"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.problem}"


class DataError(Exception):
    """The local data cannot be trained on as it is."""


class DataFileError(DataError):
    """A file is missing, not UTF-8, of an unknown kind, empty, or holds no usable example."""


class BadRecordError(DataError):
    """Some lines are unusable and were not to be skipped.

    Attributes:
        lines: The first bad lines, in reading order; bounded.
        count: How many there are in all.
    """

    def __init__(self, lines: Sequence[BadLine], count: int) -> None:
        self.lines = tuple(lines)
        self.count = count
        noun = "line" if count == 1 else "lines"
        shown = [f"{count} bad {noun} (--skip-bad-lines trains on the rest):"]
        shown += [f"  {line}" for line in self.lines[:LISTED_LINES]]
        if count > LISTED_LINES:
            shown.append(f"  and {count - min(LISTED_LINES, len(self.lines))} more")
        super().__init__("\n".join(shown))


class TextError(DataError):
    """A text that was handed over directly, not in a file, cannot be used."""


class EncoderError(DataError):
    """The tokenizer file or the token limit does not fit the bundle."""


class RecordDefectError(DataError):
    """One record is malformed; the reader turns it into a :class:`BadLine`."""
