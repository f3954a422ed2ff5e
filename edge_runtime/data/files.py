"""Reading JSONL and CSV files line by line: every record comes out, or its line is noted as bad.

A file is UTF-8 text (a byte order mark is accepted). A record is at the physical line it begins on. Blank lines are
no records. Nothing larger than :data:`MAX_LINE_BYTES` is held at once, and the notes are bounded too.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from edge_runtime.data.errors import BadLine, DataFileError, RecordDefectError
from edge_runtime.data.records import Accepted, Record, find_shape, json_kind, parse_record

MAX_LINE_BYTES = 16 << 20  # a long book; more is a file of another kind
KEPT_BAD_LINES = 100  # all are counted; a wrong file must not fill the memory with reasons
KEPT_FIELD_NAMES = 50

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class ReadLog:
    """What reading met besides records; grows while files are read.

    Attributes:
        bad_lines: The first :data:`KEPT_BAD_LINES` bad lines.
        bad_count: How many there were.
        ignored_fields: Names of the fields no record used, the first :data:`KEPT_FIELD_NAMES`, in order of appearance.
    """

    def __init__(self) -> None:
        self.bad_lines: list[BadLine] = []
        self.bad_count = 0
        self.ignored_fields: dict[str, None] = {}

    def note_bad(self, file: Path, line: int, problem: str) -> None:
        """Count a bad line, and keep it while there is room."""
        self.bad_count += 1
        if len(self.bad_lines) < KEPT_BAD_LINES:
            self.bad_lines.append(BadLine(str(file), line, problem))

    def note_ignored(self, names: tuple[str, ...]) -> None:
        """Remember field names that were not used."""
        for name in names:
            if len(self.ignored_fields) < KEPT_FIELD_NAMES:
                self.ignored_fields[name] = None


class _Row(NamedTuple):
    """The fields of one record and the line it begins on."""

    line: int
    fields: Mapping[str, object]


class _Line(NamedTuple):
    """One physical line with its end, from 1; ``defect`` when it must not be used (its text may be cut)."""

    number: int
    text: str
    defect: str | None


def read_records(path: Path, accepted: Accepted, log: ReadLog) -> Iterator[Record]:
    """Every usable record of a file, in order; the other lines go to ``log``.

    Raises:
        DataFileError: while iterating: the file cannot be read, has an unknown extension, is not UTF-8, has a header
            without the columns needed, or holds no record at all, good or bad.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        got = repr(path.suffix) if path.suffix else "none"
        raise DataFileError(f"{path}: unknown extension: expected {', '.join(_READERS)}, got {got}")
    bad_before = log.bad_count
    empty = True
    try:
        with path.open("rb") as file:
            for row in reader(path, file, accepted, log):
                empty = False
                try:
                    record, ignored = parse_record(row.fields, accepted)
                except RecordDefectError as defect:
                    log.note_bad(path, row.line, str(defect))
                    continue
                log.note_ignored(ignored)
                yield record
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read: expected a file, got: {error.strerror}") from error
    if empty and log.bad_count == bad_before:
        raise DataFileError(f"{path}: empty file: expected at least one record, got none")


def _json_rows(path: Path, file: BinaryIO, _accepted: Accepted, log: ReadLog) -> Iterator[_Row]:
    for line in _lines(path, file):
        if line.defect is not None:
            log.note_bad(path, line.number, line.defect)
        elif line.text.strip():
            try:
                fields = msgspec.json.decode(line.text)
            except (msgspec.DecodeError, RecursionError) as error:
                log.note_bad(path, line.number, f"invalid JSON: expected one object a line, got: {error}")
                continue
            if isinstance(fields, dict):
                yield _Row(line.number, fields)
            else:
                log.note_bad(path, line.number, f"not an object: expected an object, got {json_kind(fields)}")


def _comma_rows(path: Path, file: BinaryIO, accepted: Accepted, log: ReadLog) -> Iterator[_Row]:
    return _table_rows(_Table(path, file, ","), accepted, log)


def _tab_rows(path: Path, file: BinaryIO, accepted: Accepted, log: ReadLog) -> Iterator[_Row]:
    return _table_rows(_Table(path, file, "\t"), accepted, log)


def _table_rows(table: _Table, accepted: Accepted, log: ReadLog) -> Iterator[_Row]:
    """Rows below a header; conversations are lists and have no columns."""
    header: list[str] | None = None
    shapes = tuple(shape for shape in accepted.shapes if shape != ("messages",))
    for line, cells, defect in table:
        if header is None:
            header = _checked_header(f"{table.path}:{line}", cells, defect, shapes)
        elif defect is not None:
            log.note_bad(table.path, line, defect)
        elif len(cells) != len(header):
            problem = f"wrong number of fields: expected {len(header)} as in the header, got {len(cells)}"
            log.note_bad(table.path, line, problem)
        else:
            row = dict(zip(header, cells, strict=True))
            if row.pop("messages", None) is not None:
                log.note_ignored(("messages",))
            yield _Row(line, row)


def _checked_header(where: str, cells: list[str], defect: str | None, shapes: tuple[tuple[str, ...], ...]) -> list[str]:
    """Column names; a header that no row could be right under is an error of the file, not of its lines."""
    if defect is not None:
        raise DataFileError(f"{where}: unusable header: {defect}")
    try:
        find_shape(cells, shapes)
    except RecordDefectError as error:
        raise DataFileError(f"{where}: unusable header: {error}") from None  # the same defect, with its place
    twice = sorted({name for name in cells if cells.count(name) > 1})
    if twice:
        raise DataFileError(f"{where}: unusable header: expected every column once, got {twice} more than once")
    return cells


class _Table:
    """Rows of a CSV file: first line, cells, defect. Feeds the csv module and keeps the defects of what it was fed.

    The csv module wants text, so a defective line is fed without what makes it defective, and the row it belongs to
    is refused. Strict: a quote in the wrong place is a defect, not something to guess about. The csv module's own
    limit on a field (131,072 characters unless the program changed it) stays in force.
    """

    def __init__(self, path: Path, file: BinaryIO, delimiter: str) -> None:
        self.path = path
        self._lines = _lines(path, file)
        self._delimiter = delimiter
        self._defect: str | None = None

    def __iter__(self) -> Iterator[tuple[int, list[str], str | None]]:
        rows = csv.reader(self._feed(), delimiter=self._delimiter, strict=True)
        while True:
            first = rows.line_num + 1
            self._defect = None
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                problem = self._defect or f"broken row: expected fields split by {self._delimiter!r}, got: {error}"
                yield first, [], problem
                continue
            if cells or self._defect:
                yield first, cells, self._defect

    def _feed(self) -> Iterator[str]:
        for line in self._lines:
            self._defect = self._defect or line.defect
            yield line.text


def _lines(path: Path, file: BinaryIO) -> Iterator[_Line]:
    """Physical lines, split at ``\\n`` only.

    Raises:
        DataFileError: a line is not UTF-8.
    """
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_LINE_BYTES)
            yield _Line(number, "\n", f"line too long: expected at most {MAX_LINE_BYTES} bytes, got more")
            continue
        if number == 1:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            byte = f"byte 0x{raw[error.start]:02x} in column {error.start + 1}"
            raise DataFileError(f"{path}:{number}: not UTF-8: expected UTF-8 text, got {byte}") from error
        if "\0" in text:
            yield _Line(number, text.replace("\0", ""), "NUL byte: expected text, got a byte 0x00")
        else:
            yield _Line(number, text, None)


_READERS: dict[str, Callable[[Path, BinaryIO, Accepted, ReadLog], Iterator[_Row]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _comma_rows,
    ".tsv": _tab_rows,
}
