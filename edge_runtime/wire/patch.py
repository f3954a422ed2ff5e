"""The patch frame: what turns the adapter of an earlier plan into that of the current one.

A header of fixed size, a bitmap that marks the tensors it has, and these tensors in the adapter's order: modules as the
plan lists them, A before B, then the head as the manifest lists it. Shapes follow from the plan's ranks and the bundle,
so there is no general parser, and the length is known to the byte once the bitmap is. ``docs/wire.md`` has the bytes.

numpy is imported where values are read or written, not with the module: a device that waits for plans does without.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edge_runtime.wire.codes import pack_codes, packed_bytes, unpack_codes
from edge_runtime.wire.components import SMALLEST_SCALE, code_bits, quantise, restore, rounded, scale_count
from edge_runtime.wire.errors import PatchFormatError, PatchPlanError, PatchValueError
from edge_runtime.wire.plan import ModulePlan
from edge_runtime.wire.update import Layout, layout_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float32]

PatchBits = Literal[32, 8, 4]
MAGIC = b"EMBERPAT"
VERSION = 1
OWN = -1  # stands for the bundle's own adapter where a round stands for its plan's
# magic, version, bits, round, round it starts from, digest of the adapter file it makes
_HEADER = struct.Struct("<8sHHIq32s")


@dataclass(frozen=True)
class PatchHead:
    """From which plan's adapter to which, and in how many bits the matrices travel."""

    since: int  # round, or OWN
    round: int
    digest: str  # SHA-256 of the whole adapter file it makes, hex: the plan's ``adapter``
    bits: PatchBits = 32


def adapter_layout(
    ranks: Mapping[str, int], features: Mapping[str, tuple[int, int]], head: Mapping[str, tuple[int, ...]]
) -> Layout:
    """Every tensor of an adapter in the order of a patch.

    Args:
        ranks: Rank of every module, in plan order.
        features: (in, out) features of every module, from the bundle.
        head: Shapes of the trained head tensors by adapter name.

    Raises:
        PlanFormatError: a module that the bundle does not have.
    """
    return layout_of([ModulePlan(name, rank, "AB") for name, rank in ranks.items()], features, head)


def fewest_bits(tensors: Mapping[str, Values], bits: PatchBits) -> PatchBits:
    """``bits`` when every one of these tensors is what such codes restore, bit for bit; else 32."""
    if bits != 32 and all(
        rounded(name, values, bits).tobytes() == values.tobytes() for name, values in tensors.items()
    ):
        return bits
    return 32


def patch_bytes(names: Collection[str], layout: Layout, bits: PatchBits) -> int:
    """Exact length of a patch with the tensors of these names, of an adapter of this layout, in this many bits."""
    bodies = sum(_bytes_of(name, shape, bits) for name, shape in layout.blocks if name in names)
    return _HEADER.size + (len(layout.blocks) + 7) // 8 + bodies


def encode_patch(head: PatchHead, changed: Mapping[str, Values], layout: Layout) -> bytes:
    """The frame of a patch.

    Args:
        head: What it says of itself; with fewer than 32 bits the tensors must be restored ones, see `fewest_bits`.
        changed: The tensors it has, by name.
        layout: Of the whole adapter that it makes.
    """
    header = _HEADER.pack(MAGIC, VERSION, head.bits, head.round, head.since, bytes.fromhex(head.digest))
    marks = [name in changed for name, _ in layout.blocks]
    parts = [header, _bitmap(marks)]
    for name, shape in itertools.compress(layout.blocks, marks):
        values = changed[name]
        if head.bits != 32 and scale_count(name, shape):
            codes, scales = quantise(name, values, head.bits)
            parts += [scales.astype("<f4").tobytes(), pack_codes(codes.ravel(), code_bits(name, head.bits))]
        else:
            parts.append(values.astype("<f4").tobytes())
    return b"".join(parts)


def decode_patch(data: bytes, *, since: int, round_: int, digest: str, layout: Layout) -> dict[str, Values]:
    """Check and read a frame.

    Args:
        data: The frame.
        since: Round whose adapter it was asked to start from, or OWN.
        round_: The plan's.
        digest: Of the adapter that the plan names, hex.
        layout: Of that whole adapter.

    Returns:
        The tensors that are not those of the older adapter, float32 by name.

    Raises:
        PatchFormatError: magic, version, bits, a mark that belongs to no tensor, or length.
        PatchPlanError: it starts from another round or makes another plan's adapter.
        PatchValueError: NaN, infinity, a scale that is none, or bits that are no code.
    """
    if len(data) < _HEADER.size:
        raise PatchFormatError(f"patch: length: expected at least {_HEADER.size} bytes, got {len(data)}")
    magic, version, bits, to_round, from_round, makes = _HEADER.unpack_from(data)
    if (magic, version) != (MAGIC, VERSION) or bits not in (32, 8, 4):
        raise PatchFormatError(
            f"patch: expected {MAGIC!r} version {VERSION} of 32, 8 or 4 bits, got {magic!r} version {version} of {bits}"
        )
    if (from_round, to_round, makes.hex()) != (since, round_, digest):
        raise PatchPlanError(
            f"patch: expected one from round {since} to {round_} that makes {digest[:12]}, "
            f"got {from_round} to {to_round} that makes {makes.hex()[:12]}"
        )
    marked = _marked(data, layout)
    bodies = [_bytes_of(name, shape, bits) for name, shape in marked]
    start = _HEADER.size + (len(layout.blocks) + 7) // 8
    if len(data) != start + sum(bodies):
        raise PatchFormatError(f"patch: length: expected {start + sum(bodies)} bytes, got {len(data)}")
    ends = itertools.accumulate(bodies, initial=start)
    view = memoryview(data)
    return {
        name: _tensor(name, shape, view[begin:end], bits)
        for (name, shape), (begin, end) in zip(marked, itertools.pairwise(ends), strict=True)
    }


def _bitmap(marks: Sequence[bool]) -> bytes:
    """A bit a tensor, the first in the lowest bit of the first byte."""
    number = sum(1 << index for index, mark in enumerate(marks) if mark)
    return number.to_bytes((len(marks) + 7) // 8, "little")


def _marked(data: bytes, layout: Layout) -> list[tuple[str, tuple[int, ...]]]:
    count = len(layout.blocks)
    size = (count + 7) // 8
    bitmap = data[_HEADER.size : _HEADER.size + size]
    number = int.from_bytes(bitmap, "little")
    if len(bitmap) != size or number >> count:
        raise PatchFormatError(f"patch: marks: expected {count} bits and nothing beyond, got {bitmap.hex()[:80]}")
    return [block for index, block in enumerate(layout.blocks) if number >> index & 1]


def _bytes_of(name: str, shape: tuple[int, ...], bits: PatchBits) -> int:
    scales, count = scale_count(name, shape), math.prod(shape)
    return 4 * count if bits == 32 or not scales else 4 * scales + packed_bytes(count, code_bits(name, bits))


def _tensor(name: str, shape: tuple[int, ...], body: memoryview, bits: PatchBits) -> Values:
    """One tensor from its own bytes, whose length has been checked."""
    import numpy as np

    scales = 0 if bits == 32 else scale_count(name, shape)
    if bits == 32 or not scales:
        values = np.frombuffer(body, "<f4").reshape(shape)
    else:
        factors = np.frombuffer(body, "<f4", count=scales)
        if not (np.isfinite(factors).all() and factors.min() >= SMALLEST_SCALE):
            raise PatchValueError(f"patch: {name}: scales: expected finite and at least 2**-126")
        try:
            codes = unpack_codes(body[4 * scales :], math.prod(shape), code_bits(name, bits))
        except ValueError as error:
            raise PatchValueError(f"patch: {name}: {error}") from error
        with np.errstate(over="ignore"):  # an overflow is infinity, which is refused below
            values = restore(name, codes.reshape(shape), factors)
    if not np.isfinite(values).all():
        raise PatchValueError(f"patch: {name}: holds NaN or infinity")
    return values
