"""The patch: what turns the adapter of an earlier plan into that of the current one.

It has the components that are not the same. With 8 or 4 bits these are codes and scales, and a device reckons from its
older adapter what the codes are likely to be, so that only the differences need be sent, in few bits. The bytes are
those of :mod:`edge_runtime.wire.patch_frame`.

numpy is imported where values are read or written, not with the module: a device that waits for plans does without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edge_runtime.wire.codes import pack_codes, unpack_codes
from edge_runtime.wire.components import (
    SMALLEST_SCALE,
    code_bits,
    component_axis,
    quantise,
    restore,
    rounded,
    scale_count,
)
from edge_runtime.wire.errors import PatchFormatError, PatchValueError
from edge_runtime.wire.patch_frame import (
    DEFLATED,
    DIFFERENCES,
    PLAIN,
    Coding,
    Part,
    PatchBits,
    PatchFrame,
    PatchHead,
    parse_patch,
    shape_of,
)
from edge_runtime.wire.plan import ModulePlan
from edge_runtime.wire.prediction import add_differences, code_differences, predicted_codes
from edge_runtime.wire.update import Layout, layout_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float32]

_EXPONENT = 23  # the lowest bit of a float32's exponent


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


def encode_patch(
    head: PatchHead,
    changes: Mapping[str, Change],
    layout: Layout,
    *,
    older: Mapping[str, Values] | None = None,
    deflated: bool = False,
) -> bytes:
    """The frame of a patch.

    Args:
        head: What it says of itself; with fewer than 32 bits the components must be restored ones, see `fewest_bits`.
            The coding is chosen here.
        changes: What it has, by tensor.
        layout: Of the whole adapter that it makes.
        older: The adapter that it starts from, where it is here.
        deflated: Whether the reader knows more than plain codes; then the shortest coding is taken.
    """
    codings = [PLAIN]
    if deflated and head.bits != 32:
        codings += [DEFLATED] if older is None else [DEFLATED, DIFFERENCES]
    heads = [replace(head, coding=coding) for coding in codings]
    return min((PatchFrame(each, _parts(each, changes, layout, older), layout).encode() for each in heads), key=len)


def decode_patch(
    data: bytes, *, since: int, round_: int, digest: str, layout: Layout, older: Mapping[str, Values]
) -> dict[str, Change]:
    """Check and read a frame; but for ``older`` as :func:`edge_runtime.wire.patch_frame.parse_patch`.

    Args:
        data: The frame.
        since: Round whose adapter it was asked to start from, or OWN.
        round_: The plan's.
        digest: Of the adapter that the plan names, hex.
        layout: Of that whole adapter.
        older: The adapter of ``since``, checked; of the bundle's, what the plan's ranks leave.

    Returns:
        What is not as in the older adapter, by tensor.

    Raises:
        PatchFormatError: see there.
        PatchPlanError: see there.
        PatchValueError: NaN, infinity, a scale that is none, or bits that are no code.
    """
    frame = parse_patch(data, since=since, round_=round_, digest=digest, layout=layout)
    shapes = dict(layout.blocks)
    return {
        name: Change(part.numbers, _values(name, shapes[name], part, frame.head, older))
        for name, part in frame.parts.items()
    }


def _parts(
    head: PatchHead, changes: Mapping[str, Change], layout: Layout, older: Mapping[str, Values] | None
) -> dict[str, Part]:
    """Of every changed tensor, in the adapter's order."""
    found = {}
    for name, shape in layout.blocks:
        if name not in changes:
            continue
        numbers, values = changes[name].numbers, changes[name].values
        if head.bits == 32 or not scale_count(name, shape):
            found[name] = Part(numbers, values.astype("<f4").tobytes(), b"")
            continue
        codes, scales = quantise(name, values, head.bits)
        own = code_bits(name, head.bits)
        if head.coding == DIFFERENCES and (base := _base(name, shape, numbers, older)) is not None:
            codes = code_differences(codes, predicted_codes(name, base, scales, own), own)
        found[name] = Part(numbers, _scale_bytes(scales, head.coding), pack_codes(codes.ravel(), own))
    return found


def _values(name: str, shape: tuple[int, ...], part: Part, head: PatchHead, older: Mapping[str, Values]) -> Values:
    """The components of one tensor from its part, whose lengths have been checked."""
    import numpy as np

    held = shape_of(name, shape, len(part.numbers))
    if head.bits == 32 or not scale_count(name, shape):
        values = np.frombuffer(part.exact, "<f4").reshape(held)
    else:
        scales = _scales(part.exact, head.coding)
        if not (np.isfinite(scales).all() and scales.min() >= SMALLEST_SCALE):
            raise PatchValueError(f"patch: {name}: scales: expected finite and at least 2**-126")
        own = code_bits(name, head.bits)
        try:
            codes = unpack_codes(part.codes, math.prod(held), own).reshape(held)
        except ValueError as error:
            raise PatchValueError(f"patch: {name}: {error}") from error
        if head.coding == DIFFERENCES and (base := _base(name, shape, part.numbers, older)) is not None:
            codes = add_differences(codes, predicted_codes(name, base, scales, own), own)
        with np.errstate(over="ignore"):  # an overflow is infinity, which is refused below
            values = restore(name, codes, scales)
    if not np.isfinite(values).all():
        raise PatchValueError(f"patch: {name}: holds NaN or infinity")
    return values


def _base(
    name: str, shape: tuple[int, ...], numbers: Sequence[int], older: Mapping[str, Values] | None
) -> Values | None:
    """These components of an older tensor; None where it has another shape, so that nothing is known of them."""
    tensor = (older or {}).get(name)
    if tensor is None or tensor.shape != shape:
        return None
    return tensor.take(numbers, axis=component_axis(name))


def _scale_bytes(scales: Values, coding: Coding) -> bytes:
    """Float32; beside deflated codes the exponents alone, as float32 has them, for scales are powers of two."""
    if coding == PLAIN:
        return scales.astype("<f4").tobytes()
    return (scales.view("uint32") >> _EXPONENT).astype("uint8").tobytes()


def _scales(data: bytes, coding: Coding) -> Values:
    """What :func:`_scale_bytes` was given; of bytes that are no exponent 0 or infinity."""
    import numpy as np

    if coding == PLAIN:
        return np.frombuffer(data, "<f4")
    return (np.frombuffer(data, np.uint8).astype(np.uint32) << _EXPONENT).view(np.float32)
