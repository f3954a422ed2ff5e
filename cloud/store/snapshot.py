"""A copy of a database as it is at one moment, while its server goes on writing.

Through a second connection that only reads: it neither writes nor checkpoints, which only the server's may (see
:mod:`cloud.store.database`).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from cloud.store.space import write_error

_BUSY_S = 5.0


def snapshot(database: Path, copy: Path) -> None:
    """Write a copy of ``database`` to ``copy``, replacing it; only its owner may read it.

    The copy is made in one step, so that a checkpoint of the server waits for it as shortly as it can.

    Raises:
        DataFullError: the disk has no room for it.
        DataError: the database cannot be read, or the copy not be written.
    """
    try:
        copy.unlink(missing_ok=True)
        os.close(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        source = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)
        with contextlib.closing(source), contextlib.closing(sqlite3.connect(copy)) as target:
            source.backup(target)
    except (sqlite3.Error, OSError) as error:
        raise write_error(f"{database}: cannot be copied to {copy}", error) from error
