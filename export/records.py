"""Reads what an export or an evaluation needs of the user's data: labels and text records."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from export.errors import DataError


def read_records(path: Path) -> Iterator[dict[str, object]]:
    """Records of a ``.jsonl`` or ``.csv`` file, in order.

    Raises:
        DataError: the file cannot be read or a line is not a record.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _record(path, number, line)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _record(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}: line {number}: expected an object, got {type(record).__name__}")
    return record


def read_labels(path: Path) -> tuple[str, ...]:
    """The distinct ``label`` values of a file, sorted.

    Raises:
        DataError: the file cannot be read or a record has no label.
    """
    labels = set()
    for number, record in enumerate(read_records(path), start=1):
        label = record.get("label")
        if not isinstance(label, str) or not label:
            raise DataError(f"{path}: record {number}: expected a text `label`, got {label!r}")
        labels.add(label)
    return check_labels(tuple(sorted(labels)), what=str(path))


def check_labels(labels: tuple[str, ...], *, what: str) -> tuple[str, ...]:
    """Demand two or more distinct, non-empty labels.

    Raises:
        DataError: saying what is wrong.
    """
    if len(labels) < 2 or len(set(labels)) != len(labels) or not all(labels):
        raise DataError(f"{what}: expected two or more distinct labels, got {','.join(labels) or 'none'}")
    return labels
