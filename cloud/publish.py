"""The last adapter as a ``peft`` folder at ``<data>/published``, replaced in one step."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from cloud.errors import DataError, DataMissingError
from cloud.store.space import write_error
from edge_runtime.bundle import Array, Manifest, write_peft_folder

PUBLISHED = "published"
_FOLDER = "adapters"


def publish(data: Path, manifest: Manifest, tensors: Mapping[str, Array], *, digest: str) -> Path:
    """Write the adapter and let ``published`` point at it; the one before is kept for readers, older ones go.

    Raises:
        DataFullError: the disk has no room for it.
        DataError: it does not take it for another reason.
    """
    link = data / PUBLISHED
    folder = data / _FOLDER / digest
    try:
        before = link.resolve().name if link.is_symlink() else None
        if before != digest:
            write_peft_folder(folder, manifest, tensors)
            partial = data / f"{PUBLISHED}.partial"
            partial.unlink(missing_ok=True)
            partial.symlink_to(Path(_FOLDER) / digest)
            os.replace(partial, link)
            for old in folder.parent.iterdir():
                if old.name not in (digest, before):
                    shutil.rmtree(old)
    except OSError as error:
        raise write_error(f"{link}: the adapter cannot be published", error) from error
    return link


def adapter_of_file(data: Path, digest: str) -> str | None:
    """The digest of the adapter whose published ``adapter_model.safetensors`` has this SHA-256 (hex), if one has.

    Raises:
        DataError: a published file cannot be read.
    """
    try:
        for path in (data / _FOLDER).glob("*/adapter_model.safetensors"):
            if hashlib.sha256(path.read_bytes()).hexdigest() == digest:
                return path.parent.name
    except OSError as error:
        raise DataError(f"{data / _FOLDER}: cannot be read: {error.strerror}") from error
    return None


def copy_published(data: Path, out: Path) -> None:
    """Copy the published adapter to ``out``, which must not be there or be empty.

    Raises:
        DataMissingError: nothing has been published.
        DataError: ``out`` cannot be written.
    """
    link = data / PUBLISHED
    if not link.exists():
        raise DataMissingError(f"{link}: no adapter yet: no round of this task has been applied")
    try:
        if out.exists() and any(out.iterdir()):
            raise DataError(f"{out}: is not empty")
        shutil.copytree(link.resolve(), out, dirs_exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from error
