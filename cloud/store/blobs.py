"""Content-addressed blobs in a local folder, durable once :meth:`Blobs.put` has returned.

Two kinds: ``objects`` (adapters, which devices fetch) and ``updates`` (sealed, which nobody fetches). A blob's name is
the SHA-256 of its bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore

from cloud.errors import DataError, DataMissingError
from cloud.store.records import UpdateRecord
from cloud.store.space import write_error

Kind = Literal["objects", "updates"]
OBJECTS: Kind = "objects"
UPDATES: Kind = "updates"
_ASIDE = "#"  # what obstore puts between a blob's name and a number while it is being written
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """Blobs under one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for kind in (OBJECTS, UPDATES):
            (folder / kind).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._store = LocalStore(prefix=folder)

    def path(self, kind: Kind, digest: str) -> Path:
        """Where a blob lies.

        Raises:
            DataMissingError: ``digest`` is not one, so it can never leave the folder.
        """
        if not _DIGEST.fullmatch(digest):
            raise DataMissingError(f"blob {digest[:80]!r}: not a digest")
        return self._folder / kind / digest

    def put(self, kind: Kind, data: bytes, digest: str | None = None) -> str:
        """Store bytes durably and return their digest; storing the same again is harmless.

        Args:
            kind: What they are.
            data: The bytes.
            digest: Theirs, where the caller has checked it already.

        Raises:
            DataFullError: the disk has no room for them.
            DataError: it does not take them for another reason.
        """
        digest = self.write(kind, data, digest)
        self.sync_names(kind)
        return digest

    def write(self, kind: Kind, data: bytes, digest: str | None = None) -> str:
        """The same without waiting for the name to be on the disk: :meth:`sync_names` does, for many at once."""
        digest = digest or hashlib.sha256(data).hexdigest()
        try:
            # obstore writes aside and renames; it does not sync, so that is done here, file first, then folder.
            obstore.put(self._store, f"{kind}/{digest}", data)
            sync_path(self.path(kind, digest))
        except (BaseError, OSError) as error:
            raise write_error(f"blob {digest[:12]}: cannot be stored", error) from error
        return digest

    def sync_names(self, kind: Kind) -> None:
        """Wait until the names of all blobs that were written are on the disk.

        Raises:
            DataFullError: the disk has no room for them.
            DataError: it does not take them for another reason.
        """
        try:
            sync_path(self._folder / kind)
        except OSError as error:
            raise write_error(f"{kind}: the names of blobs cannot be stored", error) from error

    def drop(self, kind: Kind, digest: str) -> None:
        """Delete a blob, if it is there and the disk lets it go; what stays is tidied away later."""
        with contextlib.suppress(OSError):
            self.path(kind, digest).unlink(missing_ok=True)

    def get(self, kind: Kind, digest: str) -> bytes:
        """The bytes of a blob, checked.

        Raises:
            DataMissingError: not there, or other bytes than its name says.
        """
        try:
            data = bytes(obstore.get(self._store, f"{kind}/{self.path(kind, digest).name}").bytes())
        except (BaseError, FileNotFoundError) as error:
            raise DataMissingError(f"blob {digest[:12]}: not in {self._folder / kind}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise DataMissingError(f"blob {digest[:12]}: damaged on disk: its digest is {found[:12]}")
        return data

    def sealed(self, updates: Iterable[UpdateRecord]) -> Iterator[tuple[str, bytes]]:
        """Device and sealed bytes of counted updates, read one at a time.

        Raises:
            DataMissingError: see :meth:`get`.
        """
        for update in updates:
            yield update.receipt.device, self.get(UPDATES, update.receipt.digest)

    def keep_only(self, kind: Kind, digests: set[str], *, among: frozenset[str] | None = None) -> None:
        """Delete every blob of a kind but these, half-written ones included.

        Args:
            kind: Of the blobs.
            digests: That stay, with what is half-written of them.
            among: Files as :meth:`files` gave them, where blobs are written meanwhile: later ones stay as well.

        Raises:
            DataError: one cannot be deleted.
        """
        folder = self._folder / kind
        try:
            for name in self.files(kind) if among is None else among:
                if name.partition(_ASIDE)[0] not in digests:
                    (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be tidied: {error.strerror}") from error

    def files(self, kind: Kind) -> frozenset[str]:
        """Names of the files of a kind, half-written ones included.

        Raises:
            DataError: the folder cannot be read.
        """
        try:
            return frozenset(os.listdir(self._folder / kind))
        except OSError as error:
            raise DataError(f"{self._folder / kind}: cannot be read: {error.strerror}") from error


def sync_path(path: Path) -> None:
    """Wait until a file or a folder is on the disk.

    Raises:
        OSError: the disk does not take it.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
