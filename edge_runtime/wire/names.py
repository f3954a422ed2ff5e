"""Names that travel in URLs and signed texts: devices and tasks."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from edge_runtime.wire.errors import RequestFormatError

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")

# Field types of messages. msgspec searches a pattern, so both ends are anchored; ``$`` would let a line break pass.
Name = Annotated[str, msgspec.Meta(pattern=rf"\A{_NAME.pattern}\Z")]
Hex32 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]  # 32 bytes: a key or a SHA-256


def is_name(value: str) -> bool:
    """Whether ``value`` is a valid device or task name."""
    return _NAME.fullmatch(value) is not None


def check_name(value: str, *, what: str) -> str:
    """Return ``value`` if it is a valid device or task name.

    Raises:
        RequestFormatError: it is not 1 to 63 characters of a-z, 0-9, dot, dash, underscore, ends included.
    """
    if not is_name(value):
        raise RequestFormatError(
            f"{what} {value[:80]!r}: expected 1 to 63 lower-case letters, digits, '.', '_' or '-', "
            "beginning and ending with a letter or digit"
        )
    return value
