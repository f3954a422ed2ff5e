"""Which failures of the disk and of the database mean that there is no room, whichever library tells them."""

from __future__ import annotations

import errno
import sqlite3

from obstore.exceptions import BaseError
from sqlalchemy.exc import DBAPIError

from cloud.errors import DataError, DataFullError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# obstore has no number of its own for it: its message ends in the system's, "(os error 28)".
_TOLD_BY_OBSTORE = tuple(f"(os error {number})" for number in _FULL)
_TOLD_BY_SQLITE = "database or disk is full"  # SQLITE_FULL; Python 3.10 gives the text only


def write_error(what: str, error: Exception) -> DataError:
    """The error for a write that failed: :class:`~cloud.errors.DataFullError` where there was no room."""
    return (DataFullError if _is_full(error) else DataError)(f"{what}: {str(error).splitlines()[0]}")


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    if isinstance(error, BaseError):
        return any(told in str(error) for told in _TOLD_BY_OBSTORE)
    cause = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(cause, sqlite3.Error) and _TOLD_BY_SQLITE in str(cause)
