"""The bytes of a patch of the adapter: header, marks, and of every marked tensor what is exact and what are codes.

A header of fixed size, a bitmap that marks the components it has, and these in the adapter's order of tensors: modules
as the plan lists them, A before B, then the head as the manifest lists it. A component is a row of A, a column of B, a
row of any other matrix; what is no matrix is one. Shapes follow from the plan's ranks and the bundle, so there is no
general parser, and all lengths are known once the bitmap is. Codes follow as they are, or all together as one stream of
deflate (RFC 1951). What they mean is the affair of :mod:`edge_runtime.wire.patch`; ``docs/wire.md`` has the bytes.
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edge_runtime.wire.codes import packed_bytes
from edge_runtime.wire.components import code_bits, component_axis, scale_count
from edge_runtime.wire.deflate import RAW, deflate, inflate
from edge_runtime.wire.errors import PatchFormatError, PatchPlanError
from edge_runtime.wire.update import Layout

PatchBits = Literal[32, 8, 4]
Coding = Literal[0, 1, 2]
PLAIN: Coding = 0
DEFLATED: Coding = 1
DIFFERENCES: Coding = 2  # from the codes that the reader makes of its older adapter, deflated

MAGIC = b"EMBERPAT"
PLAIN_VERSION = 2  # 1 marked whole tensors
VERSION = 3  # of the other codings
OWN = -1  # stands for the bundle's own adapter where a round stands for its plan's
# magic, version, bits, coding, round, round it starts from, digest of the adapter file it makes
_HEADER = struct.Struct("<8sHBBIq32s")
_VALUE_BYTES = 4
_STRATEGIES = (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)  # codes seldom repeat; but where little has moved, most are 0


@dataclass(frozen=True)
class PatchHead:
    """From which plan's adapter to which, in how many bits the matrices travel, and how their codes do."""

    since: int  # round, or OWN
    round: int
    digest: str  # SHA-256 of the whole adapter file it makes, hex: the plan's ``adapter``
    bits: PatchBits = 32
    coding: Coding = PLAIN


@dataclass(frozen=True)
class Part:
    """What a patch has of one tensor.

    Attributes:
        numbers: Of the components it has, rising; (0,) where the tensor is no matrix.
        exact: Their scales, float32, of codes that are deflated a byte each; where there are no codes, the values.
        codes: Packed; nothing where there are none.
    """

    numbers: tuple[int, ...]
    exact: bytes
    codes: bytes


@dataclass(frozen=True)
class PatchFrame:
    """A patch, its values not looked at.

    Attributes:
        head: What it says of itself.
        parts: By tensor, in the adapter's order.
        layout: Of the whole adapter that it makes.
    """

    head: PatchHead
    parts: Mapping[str, Part]
    layout: Layout

    def only(self, names: Sequence[str]) -> PatchFrame:
        """The same with nothing but these tensors."""
        return replace(self, parts={name: part for name, part in self.parts.items() if name in names})

    def encode(self) -> bytes:
        """Its bytes."""
        head, parts = self.head, self.parts.values()
        version = PLAIN_VERSION if head.coding == PLAIN else VERSION
        digest = bytes.fromhex(head.digest)
        header = _HEADER.pack(MAGIC, version, head.bits, head.coding, head.round, head.since, digest)
        numbers = {name: set(part.numbers) for name, part in self.parts.items()}
        marks = [
            number in numbers.get(name, ())
            for name, count in component_counts(self.layout).items()
            for number in range(count)
        ]
        if head.coding == PLAIN:
            return b"".join([header, _bitmap(marks), *(part.exact + part.codes for part in parts)])
        codes = deflate(b"".join(part.codes for part in parts), RAW, strategies=_STRATEGIES)
        return b"".join([header, _bitmap(marks), *(part.exact for part in parts), codes])


def parse_patch(data: bytes, *, since: int, round_: int, digest: str, layout: Layout) -> PatchFrame:
    """Check and cut a frame; its values are not looked at.

    Args:
        data: The frame.
        since: Round whose adapter it was asked to start from, or OWN.
        round_: The plan's.
        digest: Of the adapter that the plan names, hex.
        layout: Of that whole adapter.

    Raises:
        PatchFormatError: magic, version, bits, coding, a mark that belongs to no component, or length.
        PatchPlanError: it starts from another round or makes another plan's adapter.
    """
    head = _head(data)
    if (head.since, head.round, head.digest) != (since, round_, digest):
        raise PatchPlanError(
            f"patch: expected one from round {since} to {round_} that makes {digest[:12]}, "
            f"got {head.since} to {head.round} that makes {head.digest[:12]}"
        )
    marked, start = _marked(data, layout)
    shapes = dict(layout.blocks)
    sizes = {
        name: _sizes_of(name, shape_of(name, shapes[name], len(numbers)), head.bits, head.coding)
        for name, numbers in marked.items()
    }
    if head.coding == PLAIN:
        pieces = _cut(data, start, [size for pair in sizes.values() for size in pair])
        pairs = list(zip(pieces[::2], pieces[1::2], strict=True))
    else:
        pairs = _deflated_pairs(data, start, list(sizes.values()))
    parts = {name: Part(marked[name], *pair) for name, pair in zip(sizes, pairs, strict=True)}
    return PatchFrame(head, parts, layout)


def patch_bytes(counts: Mapping[str, int], layout: Layout, bits: PatchBits) -> int:
    """Length of a plain patch with so many components of these tensors, of an adapter of this layout, in these bits.

    No other coding is used where it is longer.
    """
    shapes = dict(layout.blocks)
    sizes = [_sizes_of(name, shape_of(name, shapes[name], count), bits, PLAIN) for name, count in counts.items()]
    return _HEADER.size + (sum(component_counts(layout).values()) + 7) // 8 + sum(map(sum, sizes))


def component_counts(layout: Layout) -> dict[str, int]:
    """How many components every tensor of an adapter has, in its order; 1 for one that is no matrix."""
    return {name: scale_count(name, shape) or 1 for name, shape in layout.blocks}


def shape_of(name: str, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape that so many components of a tensor have."""
    if not scale_count(name, shape):
        return shape
    return (count, shape[1]) if component_axis(name) == 0 else (shape[0], count)


def _head(data: bytes) -> PatchHead:
    if len(data) < _HEADER.size:
        raise PatchFormatError(f"patch: length: expected at least {_HEADER.size} bytes, got {len(data)}")
    magic, version, bits, coding, to_round, from_round, makes = _HEADER.unpack_from(data)
    codings = {PLAIN_VERSION: (PLAIN,), VERSION: (DEFLATED, DIFFERENCES)}.get(version, ())
    if magic != MAGIC or not codings or bits not in (32, 8, 4):
        raise PatchFormatError(
            f"patch: expected {MAGIC!r} version {PLAIN_VERSION} or {VERSION} of 32, 8 or 4 bits, "
            f"got {magic!r} version {version} of {bits}"
        )
    if coding not in codings or (coding != PLAIN and bits == 32):
        raise PatchFormatError(f"patch: coding {coding}: none of version {version} with {bits} bits")
    return PatchHead(from_round, to_round, makes.hex(), bits, coding)


def _bitmap(marks: Sequence[bool]) -> bytes:
    """A bit a component, the first in the lowest bit of the first byte."""
    number = sum(1 << index for index, mark in enumerate(marks) if mark)
    return number.to_bytes((len(marks) + 7) // 8, "little")


def _marked(data: bytes, layout: Layout) -> tuple[dict[str, tuple[int, ...]], int]:
    """The components that are marked, by tensor that has any, and where what they are begins."""
    counts = component_counts(layout)
    count = sum(counts.values())
    size = (count + 7) // 8
    bitmap = data[_HEADER.size : _HEADER.size + size]
    number = int.from_bytes(bitmap, "little")
    if len(bitmap) != size or number >> count:
        raise PatchFormatError(f"patch: marks: expected {count} bits and nothing beyond, got {bitmap.hex()[:80]}")
    found = {}
    for name, components in counts.items():
        if numbers := tuple(place for place in range(components) if number >> place & 1):
            found[name] = numbers
        number >>= components
    return found, _HEADER.size + size


def _sizes_of(name: str, shape: tuple[int, ...], bits: PatchBits, coding: Coding) -> tuple[int, int]:
    """Bytes of what is exact and of packed codes."""
    scales, count = scale_count(name, shape), math.prod(shape)
    if bits == 32 or not scales:
        return _VALUE_BYTES * count, 0
    exact = _VALUE_BYTES * scales if coding == PLAIN else scales
    return exact, packed_bytes(count, code_bits(name, bits))


def _cut(data: bytes, start: int, sizes: Sequence[int]) -> list[bytes]:
    """Pieces of these sizes, which are all there is from ``start`` on."""
    if len(data) != start + sum(sizes):
        raise PatchFormatError(f"patch: length: expected {start + sum(sizes)} bytes, got {len(data)}")
    ends = itertools.accumulate(sizes, initial=start)
    return [data[begin:end] for begin, end in itertools.pairwise(ends)]


def _deflated_pairs(data: bytes, start: int, sizes: Sequence[tuple[int, int]]) -> list[tuple[bytes, bytes]]:
    """What is exact of every tensor, and its codes out of the stream that follows."""
    begins = start + sum(exact for exact, _ in sizes)
    exact = _cut(data[:begins], start, [size for size, _ in sizes])
    codes = _inflate(data[begins:], sum(size for _, size in sizes))
    return list(zip(exact, _cut(codes, 0, [size for _, size in sizes]), strict=True))


def _inflate(data: bytes, size: int) -> bytes:
    """So many bytes out of a stream."""
    try:
        found = inflate(data, RAW, most=size)
    except ValueError as error:
        raise PatchFormatError(f"patch: codes: {error}") from error
    if len(found) != size:
        raise PatchFormatError(f"patch: codes: expected a stream of {size} bytes, got {len(found)}")
    return found
