"""Writes a bundle: into a folder beside its place first, so that a failed export leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.bundle import MANIFEST_NAME, WEIGHTS_FILE, Array, Manifest, encode_manifest, file_entry, write_tensors
from export.errors import OutputError


@dataclass(frozen=True)
class Contents:
    """Everything that goes into a bundle; the manifest's ``files`` are filled in while writing."""

    manifest: Manifest
    graphs: Mapping[str, Any]  # file name -> ONNX model
    weights: Mapping[str, Array]
    adapter: Mapping[str, Array]
    tokenizer: str  # tokenizer.json


def check_place(out: Path, *, force: bool) -> None:
    """Demand that ``out`` is free, or a bundle that may be replaced.

    Raises:
        OutputError: something is there; ``force`` replaces only a bundle or an empty folder.
    """
    if not out.exists() and not out.is_symlink():
        return
    replaceable = out.is_dir() and ((out / MANIFEST_NAME).is_file() or not any(out.iterdir()))
    if not force:
        raise OutputError(f"{out}: exists already: choose another --out, or --force to replace a bundle")
    if not replaceable:
        raise OutputError(f"{out}: exists and is no bundle: it is not replaced")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its place when the context ends well, and is removed when it does not.

    Raises:
        OutputError: the folder cannot be made or moved.
    """
    stage, old = (out.absolute().with_name(f".{out.absolute().name}.{word}-{os.getpid()}") for word in ("new", "old"))
    try:
        stage.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error}") from error
    try:
        yield stage
        _swap(stage, out, old)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _swap(stage: Path, out: Path, old: Path) -> None:
    try:
        if out.exists():
            out.rename(old)
        stage.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise OutputError(f"{out}: cannot be written: {error}") from error


def write_bundle(folder: Path, contents: Contents) -> None:
    """Write every file of a bundle into the empty ``folder``, the manifest last."""
    (folder / "graphs").mkdir()
    for name, model in contents.graphs.items():
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))
    write_tensors(folder / WEIGHTS_FILE, contents.weights)
    write_tensors(folder / "adapter.safetensors", contents.adapter)
    (folder / "tokenizer.json").write_text(contents.tokenizer, encoding="utf-8")
    names = [*contents.graphs, WEIGHTS_FILE, "adapter.safetensors", "tokenizer.json"]
    manifest = msgspec.structs.replace(
        contents.manifest, files={name: file_entry(folder / name) for name in sorted(names)}
    )
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
