"""A bundle on disk: opened lazily, verified by digest before anything of it is used."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.bundle.errors import BundleDigestError, BundleMissingError, ManifestError
from edge_runtime.bundle.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    WEIGHTS_FILE,
    FileEntry,
    Manifest,
    parse_manifest,
)
from edge_runtime.bundle.tensors import ABSENT, Array, map_tensors


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; ``digest`` is the SHA-256 of its manifest in hex."""

    folder: Path
    digest: str
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Where the bundle's file ``name`` is."""
        return self.folder / name

    def weights(self) -> dict[str, Array]:
        """The frozen weights, mapped read-only."""
        return map_tensors(self.path(WEIGHTS_FILE))

    def initial_adapter(self) -> dict[str, Array]:
        """The adapter a task starts from, see :mod:`edge_runtime.bundle.adapter` for its tensors."""
        return map_tensors(self.path("adapter.safetensors"))


def open_bundle(folder: Path, *, expected_digest: str | None = None, verify: bool = True) -> Bundle:
    """Open a bundle folder.

    Args:
        folder: The folder with ``manifest.json``.
        expected_digest: Digest the manifest must have, from a signed plan.
        verify: Hash every file. A device that has verified a bundle once may skip this.

    Raises:
        BundleMissingError: the folder or one of its files is not there.
        BundleDigestError: the manifest or a file has other bytes than promised.
        ManifestError: the manifest is not one.
    """
    path = folder / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
        data = path.read_bytes()
    except ABSENT as error:
        raise BundleMissingError(f"{folder}: not a bundle: it has no {MANIFEST_NAME}") from error
    digest = hashlib.sha256(data).hexdigest()
    if expected_digest is not None and digest != expected_digest:
        raise BundleDigestError(f"{path}: expected digest {expected_digest}, got {digest}")
    manifest = parse_manifest(data)
    if verify:
        for name, entry in manifest.files.items():
            verify_file(folder / name, entry)
    return Bundle(folder=folder, digest=digest, manifest=manifest)


def file_entry(path: Path) -> FileEntry:
    """Digest and length of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        return FileEntry(sha256=digest.hexdigest(), bytes=file.tell())


def verify_file(path: Path, entry: FileEntry) -> None:
    """Check one file against its entry.

    Raises:
        BundleMissingError: it is not there.
        BundleDigestError: other length or digest.
    """
    try:
        found = file_entry(path)
    except ABSENT as error:
        raise BundleMissingError(f"{path}: no such file, though the manifest names it") from error
    if found != entry:
        raise BundleDigestError(
            f"{path}: expected {entry.bytes} bytes with SHA-256 {entry.sha256}, got {found.bytes} with {found.sha256}"
        )
