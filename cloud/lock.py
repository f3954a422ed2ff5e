"""One process a data folder: SQLite wants one writer, and the round's sum lives in that process's memory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from cloud.errors import DataError, DataLockedError


class FolderLock:
    """An exclusive lock on a folder, held until :meth:`release` or the end of the process."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            DataLockedError: another process holds it.
            DataError: the folder cannot be made or written to.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataError(f"{folder}: cannot be used as data folder: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise DataLockedError(f"{folder}: another aggregator is using this data folder; stop it first") from error

    def release(self) -> None:
        """Give the lock back; twice does no harm."""
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = -1
