"""Atomic, durable writes and strict reads of the device's small files.

A file is either the old one or the new one, whatever happens: bytes go to ``NAME.partial``, are synced, and take the
name in one step; then the folder is synced. Everything is readable by its owner only.
What is encrypted besides comes here encrypted already.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_runtime.device.errors import CorruptFileError

MAX_RECORD_BYTES = 1 << 20
T = TypeVar("T", bound=msgspec.Struct)


def make_folder(path: Path) -> Path:
    """Make a folder that only its owner may enter, and return it; an existing one is left as it is."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def sync_folder(path: Path) -> None:
    """Make renames and removals in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, mode 0600, atomically and durably."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # its mode would survive
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def write_record(path: Path, record: msgspec.Struct) -> None:
    """Write a struct as JSON for human eyes."""
    write_bytes(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def read_record(path: Path, kind: type[T]) -> T | None:
    """Read a struct; None when there is no such file.

    Raises:
        CorruptFileError: it is there and is not one.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(data) > MAX_RECORD_BYTES:
        raise CorruptFileError(f"{path}: damaged: longer than {MAX_RECORD_BYTES} bytes")
    return decode_record(data, kind, what=path)


def decode_record(data: bytes, kind: type[T], *, what: Path) -> T:
    """The struct that these bytes of the file ``what`` are.

    Raises:
        CorruptFileError: they are none.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptFileError(f"{what}: damaged: not a record of kind {kind.__name__}: {error}") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 18):
            digest.update(piece)
    return digest.hexdigest()
