"""Deflate, written with care for size and read with care for memory.

Two containers: raw (RFC 1951), as the codes of a patch have it, and zlib's (RFC 1950), which is what HTTP calls
``deflate`` (RFC 9110, 8.4.1.2).
"""

from __future__ import annotations

import zlib

RAW = -zlib.MAX_WBITS
ZLIB = zlib.MAX_WBITS
DEFLATE = "deflate"  # HTTP's name of it


def deflate(data: bytes, container: int, *, strategies: tuple[int, ...] = (zlib.Z_DEFAULT_STRATEGY,)) -> bytes:
    """The shortest stream that one of zlib's strategies makes of the data."""
    found = []
    for strategy in strategies:
        stream = zlib.compressobj(9, zlib.DEFLATED, container, 9, strategy)
        found.append(stream.compress(data) + stream.flush())
    return min(found, key=len)


def inflate(data: bytes, container: int, *, most: int) -> bytes:
    """What a stream holds; of more than ``most`` bytes ``most`` + 1, and no more than that is ever made.

    Raises:
        ValueError: (for the caller to name) no stream, a cut one, or something behind its end.
    """
    stream = zlib.decompressobj(container)
    try:
        found = stream.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(f"no stream of deflate: {error}") from error
    if len(found) <= most and (not stream.eof or stream.unused_data):
        raise ValueError("a stream of deflate that is cut, or has something behind its end")
    return found
