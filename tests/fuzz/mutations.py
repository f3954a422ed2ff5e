"""Hostile bytes from good ones: what fuzzers have found to break parsers, a few at a time.

The operators are those of AFL (havoc stage): flipped bits, boundary numbers, pieces cut out, doubled, moved in from
another sample; and for text the same with whole JSON tokens, which random bytes would hardly ever leave well formed.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Sequence

_TOKEN = re.compile(rb'-?\d[\d.eE+-]*|"(?:[^"\\]|\\.)*"|true|false|null|[\[\]{}:,]')
_EDGES = tuple(
    edge + step for edge in (0, 1 << 7, 1 << 8, 1 << 15, 1 << 16, 1 << 31, 1 << 32, 1 << 63) for step in (-1, 0)
)
_TEXTS = (
    b"null", b"true", b"[]", b"{}", b'""', b"0", b"-1", b"-0", b"1e400", b"-1e400", b"1e-400", b"NaN", b"0.5", b"1.0",
    b"18446744073709551616", b"9223372036854775807", b"1" + b"0" * 400, b'"\\ud800"', b'"\\u0000"',
    b'"' + b"a" * 70 + b'"',
    b'"\xff"', b"[" * 2_000, b'{"a":' * 2_000, b'"../x"', b'"layer.0.query"',
)  # fmt: skip
_FLOATS = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00")
_MOST_BYTES = 1 << 16

Operator = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def mutated(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One of the samples with one to four changes; now and then bytes that come from none of them."""
    if rng.random() < 0.02:
        return rng.randbytes(rng.randrange(300))
    data = rng.choice(corpus)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        data = rng.choice(_OPERATORS)(rng, data, corpus)
    return data[:_MOST_BYTES]


def shortest(data: bytes, fails: Callable[[bytes], bool]) -> bytes:
    """``data`` with all pieces taken out without which it still fails, larger ones first."""
    size = max(len(data) // 2, 1)
    while True:
        start = 0
        while start < len(data):
            shorter = data[:start] + data[start + size :]
            if fails(shorter):
                data = shorter
            else:
                start += size
        if size == 1:
            return data
        size //= 2


def _flip(rng: random.Random, data: bytes, _corpus: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) or 1)
    return data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]


def _byte(rng: random.Random, data: bytes, _corpus: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) or 1)
    return data[:at] + rng.randbytes(1) + data[at + 1 :]


def _number(rng: random.Random, data: bytes, _corpus: Sequence[bytes]) -> bytes:
    """A boundary number over two, four or eight bytes, little endian as all our frames are; or a hard float."""
    size, code = rng.choice(((2, "<H"), (4, "<I"), (8, "<Q")))
    number = (rng.choice(_EDGES) + rng.randrange(-1, 2)) % (1 << 8 * size)
    put = struct.pack(code, number) if rng.random() < 0.8 else rng.choice(_FLOATS)
    at = rng.randrange(max(len(data) - len(put), 0) + 1)
    return data[:at] + put + data[at + len(put) :]


def _cut(rng: random.Random, data: bytes, _corpus: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randrange(1, 24) :]


def _end(rng: random.Random, data: bytes, _corpus: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data + rng.randbytes(rng.randrange(1, 24))


def _double(rng: random.Random, data: bytes, _corpus: Sequence[bytes]) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.randrange(1, 40)
    return data[:at] + data[at : at + size] * rng.choice((2, 2, 3, 50)) + data[at + size :]


def _splice(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    other = rng.choice(corpus)
    at, start = rng.randrange(len(data) + 1), rng.randrange(len(other) + 1)
    return data[:at] + other[start : start + rng.randrange(1, 80)] + data[at + rng.randrange(0, 80) :]


def _token(rng: random.Random, data: bytes, _corpus: Sequence[bytes]) -> bytes:
    """Put something else in place of a token of JSON, or take it out."""
    found = list(_TOKEN.finditer(data))
    if not found:
        return data
    token = rng.choice(found)
    put = rng.choice((rng.choice(_TEXTS), rng.choice(found)[0], b""))
    return data[: token.start()] + put + data[token.end() :]


def _member(rng: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """Put a run of tokens, such as a member of an object, where another one begins: keys twice, keys of others."""
    other = rng.choice(corpus)
    here, there = list(_TOKEN.finditer(data)), list(_TOKEN.finditer(other))
    if not here or not there:
        return data
    first = rng.randrange(len(there))
    last = min(first + rng.choice((1, 3, 4, 4, 8)), len(there)) - 1
    at = rng.choice(here).start()
    return data[:at] + other[there[first].start() : there[last].end()] + data[at:]


_OPERATORS: tuple[Operator, ...] = (
    _flip,
    _byte,
    _number,
    _cut,
    _end,
    _double,
    _splice,
    _token,
    _token,
    _token,
    _member,
)
