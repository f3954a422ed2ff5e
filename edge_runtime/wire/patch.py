"""The patch frame: what turns the adapter of an earlier plan into that of the current one.

A header of fixed size, a bitmap that marks the components it has, and these in the adapter's order of tensors: modules
as the plan lists them, A before B, then the head as the manifest lists it. A component is a row of A, a column of B, a
row of any other matrix; what is no matrix is one. Shapes follow from the plan's ranks and the bundle, so there is no
general parser, and the length is known to the byte once the bitmap is. ``docs/wire.md`` has the bytes.

numpy is imported where values are read or written, not with the module: a device that waits for plans does without.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edge_runtime.wire.codes import pack_codes, packed_bytes, unpack_codes
from edge_runtime.wire.components import (
    SMALLEST_SCALE,
    code_bits,
    component_axis,
    quantise,
    restore,
    rounded,
    scale_count,
)
from edge_runtime.wire.errors import PatchFormatError, PatchPlanError, PatchValueError
from edge_runtime.wire.plan import ModulePlan
from edge_runtime.wire.update import Layout, layout_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float32]

PatchBits = Literal[32, 8, 4]
MAGIC = b"EMBERPAT"
VERSION = 2  # 1 marked whole tensors
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


@dataclass(frozen=True)
class Change:
    """Components of a tensor that are new.

    Attributes:
        numbers: Of the components, rising; (0,) where the tensor is no matrix.
        values: Of these alone, float32: rows (k, in) of ``lora_a``, columns (out, k) of ``lora_b``, rows of any other.
    """

    numbers: tuple[int, ...]
    values: Values

    def applied(self, name: str, older: Values | None, shape: tuple[int, ...]) -> Values:
        """The tensor of this name and shape that the change makes of the older one; None where there is none.

        Raises:
            PatchFormatError: the older one has another shape, and the change does not replace all of it.
        """
        if self.values.shape == shape:
            return self.values
        if older is None or older.shape != shape:
            found = "none" if older is None else older.shape
            raise PatchFormatError(f"patch: {name}: some components of {shape}, but the older adapter has {found}")
        made, numbers = older.copy(), list(self.numbers)
        if component_axis(name) == 0:
            made[numbers] = self.values
        else:
            made[:, numbers] = self.values
        return made


def change_of(name: str, values: Values, numbers: Sequence[int]) -> Change:
    """The change that makes these components of a tensor those of ``values``, the whole tensor."""
    if not scale_count(name, values.shape):
        return Change((0,), values)
    return Change(tuple(numbers), values.take(numbers, axis=component_axis(name)))


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


def fewest_bits(changes: Mapping[str, Change], bits: PatchBits) -> PatchBits:
    """``bits`` when every one of these components is what such codes restore, bit for bit; else 32."""
    if bits != 32 and all(
        rounded(name, change.values, bits).tobytes() == change.values.tobytes() for name, change in changes.items()
    ):
        return bits
    return 32


def patch_bytes(counts: Mapping[str, int], layout: Layout, bits: PatchBits) -> int:
    """Exact length of a patch with so many components of these tensors, of an adapter of this layout, in these bits."""
    shapes = dict(layout.blocks)
    bodies = sum(_bytes_of(name, _shape_of(name, shapes[name], count), bits) for name, count in counts.items())
    return _HEADER.size + (sum(component_counts(layout).values()) + 7) // 8 + bodies


def encode_patch(head: PatchHead, changes: Mapping[str, Change], layout: Layout) -> bytes:
    """The frame of a patch.

    Args:
        head: What it says of itself; with fewer than 32 bits the components must be restored ones, see `fewest_bits`.
        changes: What it has, by tensor.
        layout: Of the whole adapter that it makes.
    """
    header = _HEADER.pack(MAGIC, VERSION, head.bits, head.round, head.since, bytes.fromhex(head.digest))
    numbers = {name: set(change.numbers) for name, change in changes.items()}
    marks = [n in numbers.get(name, ()) for name, count in component_counts(layout).items() for n in range(count)]
    parts = [header, _bitmap(marks)]
    for name, shape in layout.blocks:
        if name not in changes:
            continue
        values = changes[name].values
        if head.bits != 32 and scale_count(name, shape):
            codes, scales = quantise(name, values, head.bits)
            parts += [scales.astype("<f4").tobytes(), pack_codes(codes.ravel(), code_bits(name, head.bits))]
        else:
            parts.append(values.astype("<f4").tobytes())
    return b"".join(parts)


def decode_patch(data: bytes, *, since: int, round_: int, digest: str, layout: Layout) -> dict[str, Change]:
    """Check and read a frame.

    Args:
        data: The frame.
        since: Round whose adapter it was asked to start from, or OWN.
        round_: The plan's.
        digest: Of the adapter that the plan names, hex.
        layout: Of that whole adapter.

    Returns:
        What is not as in the older adapter, by tensor.

    Raises:
        PatchFormatError: magic, version, bits, a mark that belongs to no component, or length.
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
    marked, start = _marked(data, layout)
    shapes = [_shape_of(name, shape, len(marked[name])) for name, shape in layout.blocks if name in marked]
    bodies = [_bytes_of(name, shape, bits) for name, shape in zip(marked, shapes, strict=True)]
    if len(data) != start + sum(bodies):
        raise PatchFormatError(f"patch: length: expected {start + sum(bodies)} bytes, got {len(data)}")
    ends = itertools.accumulate(bodies, initial=start)
    view = memoryview(data)
    return {
        name: Change(marked[name], _components(name, shape, view[begin:end], bits))
        for name, shape, (begin, end) in zip(marked, shapes, itertools.pairwise(ends), strict=True)
    }


def component_counts(layout: Layout) -> dict[str, int]:
    """How many components every tensor of an adapter has, in its order; 1 for one that is no matrix."""
    return {name: scale_count(name, shape) or 1 for name, shape in layout.blocks}


def _bitmap(marks: Sequence[bool]) -> bytes:
    """A bit a component, the first in the lowest bit of the first byte."""
    number = sum(1 << index for index, mark in enumerate(marks) if mark)
    return number.to_bytes((len(marks) + 7) // 8, "little")


def _marked(data: bytes, layout: Layout) -> tuple[dict[str, tuple[int, ...]], int]:
    """The components that are marked, by tensor that has any, and where the values begin."""
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


def _shape_of(name: str, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape that so many components of a tensor have."""
    if not scale_count(name, shape):
        return shape
    return (count, shape[1]) if component_axis(name) == 0 else (shape[0], count)


def _bytes_of(name: str, shape: tuple[int, ...], bits: PatchBits) -> int:
    scales, count = scale_count(name, shape), math.prod(shape)
    return 4 * count if bits == 32 or not scales else 4 * scales + packed_bytes(count, code_bits(name, bits))


def _components(name: str, shape: tuple[int, ...], body: memoryview, bits: PatchBits) -> Values:
    """The marked components of one tensor from their own bytes, whose length has been checked."""
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
