"""Updates that come in parts: what is there of each, durable once :meth:`Parts.append` has returned.

A device has at most one such update a round; when it begins another, what there was of the last one is dropped. A kill
or a power cut may leave bytes at the end that nobody has acknowledged, or wrong ones: the digest of the whole tells.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cloud.errors import DataError, DataMissingError
from cloud.store.blobs import sync_path
from cloud.store.space import write_error


class Parts:
    """Unfinished updates under one folder. Names have been checked: they are part of paths."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def received(self, round_: int, device: str, digest: str) -> int:
        """How many bytes of an update are there; 0 without any."""
        try:
            return self._path(round_, device, digest).stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, round_: int, device: str, digest: str, part: bytes, *, offset: int) -> None:
        """Add bytes to the end of an update, which is at ``offset``; one caller at a time for a device.

        Raises:
            DataMissingError: what there was has been dropped meanwhile.
            DataFullError: the disk has no room for them; what was there before is there still.
            DataError: it does not take them for another reason; the same.
        """
        if not part:
            return
        path = self._path(round_, device, digest)
        before = self.received(round_, device, digest)
        if before != offset:
            raise _gone(digest)
        try:
            if not before:
                self._begin(path)
            with path.open("ab") as file:
                file.write(part)
                file.flush()
                os.fsync(file.fileno())
            if not before:
                sync_path(path.parent)
        except FileNotFoundError as error:
            raise _gone(digest) from error
        except OSError as error:
            _cut(path, before)
            raise write_error(f"part of update {digest[:12]}: cannot be stored", error) from error

    def whole(self, round_: int, device: str, digest: str) -> bytes:
        """All bytes that are there.

        Raises:
            DataMissingError: they have been dropped.
            DataError: they cannot be read.
        """
        try:
            return self._path(round_, device, digest).read_bytes()
        except FileNotFoundError as error:
            raise _gone(digest) from error
        except OSError as error:
            raise DataError(f"parts of update {digest[:12]}: cannot be read: {error.strerror}") from error

    def drop(self, round_: int, device: str) -> None:
        """Forget what there is of a device's update; what the disk does not let go is tidied away later."""
        shutil.rmtree(self._path(round_, device, "").parent, ignore_errors=True)

    def keep_only(self, round_: int) -> None:
        """Drop all that is not of this round."""
        if self._folder.is_dir():
            for folder in self._folder.iterdir():
                if folder.name != str(round_):
                    shutil.rmtree(folder, ignore_errors=True)

    def _begin(self, path: Path) -> None:
        """An empty folder for a device's update."""
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True, mode=0o700)
        for folder in (path.parent.parent, self._folder, self._folder.parent):
            sync_path(folder)

    def _path(self, round_: int, device: str, digest: str) -> Path:
        return self._folder / str(round_) / device / digest


def _gone(digest: str) -> DataMissingError:
    return DataMissingError(f"parts of update {digest[:12]}: are not there any more")


def _cut(path: Path, size: int) -> None:
    """Take away what was written after the first ``size`` bytes; a file that cannot be cut is found by its digest."""
    try:
        os.truncate(path, size)
    except OSError:
        return
