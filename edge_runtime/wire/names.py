"""Names that travel in URLs and signed texts: devices and tasks."""

from __future__ import annotations

import re

from edge_runtime.wire.errors import RequestFormatError

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")


def check_name(value: str, *, what: str) -> str:
    """Return ``value`` if it is a valid device or task name.

    Raises:
        RequestFormatError: it is not 1 to 63 characters of a-z, 0-9, dot, dash, underscore, ends included.
    """
    if not _NAME.fullmatch(value):
        raise RequestFormatError(
            f"{what} {value[:80]!r}: expected 1 to 63 lower-case letters, digits, '.', '_' or '-', "
            "beginning and ending with a letter or digit"
        )
    return value
