"""The update frame: what a device sends back after training, before it is sealed.

A header of fixed size, then the alive blocks in plan order as little-endian float32 or, where the plan quantises, as
packed codes, then a trailer of fixed size with the weight and the local metrics. There is no general parser: the plan
and the tier say how long the payload is, and anything else is refused before a value is looked at. ``docs/wire.md`` has
the bytes.

numpy is imported where values are read or written, not with the module: a device that waits for plans does without.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from edge_runtime.wire.errors import (
    PlanFormatError,
    UpdateFormatError,
    UpdateLayoutError,
    UpdateNormError,
    UpdatePlanError,
    UpdateValueError,
)
from edge_runtime.wire.plan import ModulePlan, Plan, SignedPlan, UpdateRules
from edge_runtime.wire.quantisation import Quantisation, decode_codes, encode_codes, payload_bytes
from edge_runtime.wire.tiers import Tier

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.float32]

MAGIC = b"EMBERUPD"
VERSION = 1
QUANTISED_VERSION = 2  # the payload is packed codes
SPARSE_VERSION = 3  # of some of the values, after their positions
# magic, version, tier, round, plan digest, layout digest, number of values
_HEADER = struct.Struct("<8sHHI32s32sQ")
# weight, steps, examples evaluated, correct of them, loss at start, loss at end, evaluation loss, seconds, peak MB ×2
_TRAILER = struct.Struct("<QIIIddddff")
_CHUNK = 1 << 16  # values that are made float64 at once


@dataclass(frozen=True)
class Layout:
    """The alive blocks of an update in order: (name, shape). Names are those of the adapter's tensors.

    Attributes:
        blocks: Name and shape of what is trained of each tensor.
        quantisation: A range for each of them where updates are sent as codes; None: as float32.
        components: By name, the numbers of a factor's components that are trained, where not all are.
        tier: Of the devices that send such updates.
    """

    blocks: tuple[tuple[str, tuple[int, ...]], ...]
    quantisation: Quantisation | None = None
    components: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    tier: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of every block."""
        return tuple(math.prod(shape) for _, shape in self.blocks)

    @property
    def count(self) -> int:
        """Number of values of an update."""
        return sum(self.sizes)

    @property
    def held(self) -> int:
        """Number of values that an update says: all of them, or the share that the plan's density is."""
        return self.quantisation.held(self.count) if self.quantisation else self.count

    @property
    def version(self) -> int:
        """Of the frames."""
        if self.quantisation is None:
            return VERSION
        return QUANTISED_VERSION if self.quantisation.density is msgspec.UNSET else SPARSE_VERSION

    @property
    def frame_bytes(self) -> int:
        """Exact length of an unsealed update in bytes."""
        payload = payload_bytes(self.sizes, self.quantisation) if self.quantisation else 4 * self.count
        return _HEADER.size + payload + _TRAILER.size

    def digest(self) -> bytes:
        """SHA-256 over names and shapes, one block a line."""
        lines = "".join(f"{name} {'x'.join(map(str, shape))}\n" for name, shape in self.blocks)
        return hashlib.sha256(lines.encode()).digest()

    def where(self, name: str) -> tuple[Any, ...]:
        """Index of a tensor's trained part in the tensor; the block is ``tensor[layout.where(name)]``."""
        listed = self.components.get(name)
        if listed is None:
            return (...,)
        return (list(listed),) if name.endswith(".lora_a") else (slice(None), list(listed))

    def split(self, values: npt.NDArray[np.generic]) -> dict[str, npt.NDArray[np.generic]]:
        """Views of a flat array, shape (count,), by block name."""
        parts, start = {}, 0
        for name, shape in self.blocks:
            end = start + math.prod(shape)
            parts[name] = values[start:end].reshape(shape)
            start = end
        return parts


def layout_of(
    modules: Iterable[ModulePlan],
    features: Mapping[str, tuple[int, int]],
    head: Mapping[str, tuple[int, ...]],
    quantisation: Quantisation | None = None,
) -> Layout:
    """The layout a plan asks for.

    Args:
        modules: The plan's modules, in order.
        features: (in, out) features of every module, from the bundle.
        head: Shapes of the trained head tensors by adapter name when the head is alive, else empty.
        quantisation: The plan's.

    Raises:
        PlanFormatError: the plan names a module that the bundle does not have, or not one range for every block.
    """
    blocks: list[tuple[str, tuple[int, ...]]] = []
    components: dict[str, tuple[int, ...]] = {}
    for module in modules:
        if module.name not in features:
            raise PlanFormatError(f"plan: module {module.name[:200]!r}: the bundle has no such module")
        in_features, out_features = features[module.name]
        rank = module.trained_rank
        shapes = {"A": (rank, in_features), "B": (out_features, rank)}
        for factor, shape in shapes.items():
            if factor in module.alive:
                name = f"{module.name}.lora_{factor.lower()}"
                blocks.append((name, shape))
                if rank < module.rank:
                    components[name] = module.trained_components
    layout = Layout((*blocks, *head.items()), quantisation, components)
    if quantisation and len(quantisation.ranges) != len(layout.blocks):
        raise PlanFormatError(
            f"plan: quantisation: expected {len(layout.blocks)} ranges, one a block, got {len(quantisation.ranges)}"
        )
    return layout


def tier_layouts(
    plan: Plan,
    *,
    features: Mapping[str, tuple[int, int]],
    places: Mapping[str, int],
    head: Mapping[str, tuple[int, ...]],
) -> tuple[Layout, ...]:
    """The layouts of updates to a plan that trains, of tier 0, 1 and so on.

    Args:
        plan: Says what is alive, and what of it each tier carries.
        features: (in, out) features of every module, from the bundle.
        places: Number of the block of every module, from the bundle.
        head: Shapes of the trained head's tensors by adapter name; every tier carries it where it is alive.

    Raises:
        PlanFormatError: see :func:`layout_of`.
    """
    head = head if plan.head_alive else {}
    whole = layout_of(plan.modules, features, head, plan.quantisation or None)
    names = [name for name, _ in whole.blocks]
    found = [whole]
    for number in range(1, 1 + len(plan.tiers or ())):
        part = layout_of(carried_modules(plan, number, places), features, head)
        quantisation = whole.quantisation
        if quantisation is not None:
            ranges = dict(zip(names, quantisation.ranges, strict=True))
            mine = tuple(ranges[name] for name, _ in part.blocks)
            quantisation = msgspec.structs.replace(quantisation, ranges=mine)
        found.append(Layout(part.blocks, quantisation, part.components, number))
    return tuple(found)


def carried_modules(plan: Plan, number: int, places: Mapping[str, int]) -> tuple[ModulePlan, ...]:
    """A plan's modules as a tier of it trains them; ``places`` are the numbers of their blocks."""
    if number == 0 or plan.tiers is msgspec.UNSET:
        return plan.modules
    tier = plan.tiers[number - 1]
    return tuple(_carried(module, tier, places[module.name]) for module in plan.modules)


def _carried(module: ModulePlan, tier: Tier, place: int) -> ModulePlan:
    if not module.alive:
        return module
    if place < tier.lowest_block:
        return ModulePlan(module.name, module.rank, "")
    if module.trained_rank <= tier.rank_bound:
        return module
    return msgspec.structs.replace(module, trained=module.trained_components[: tier.rank_bound])


@dataclass(frozen=True)
class LocalMetrics:
    """What a device says about its round. Losses are mean nats; None (NaN in the frame) where nothing was measured.

    ``tier`` is that of the layout, and stands in the frame's header.
    """

    steps: int = 0
    eval_examples: int = 0
    eval_correct: int = 0
    loss_start: float | None = None
    loss_end: float | None = None
    eval_loss: float | None = None
    seconds: float | None = None
    peak_private_mb: float | None = None
    peak_total_mb: float | None = None
    tier: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class Update:
    """Change of the alive parameters, flat, shape (count,), and the device's weight before it is capped.

    Where the layout quantises, every value is one that a code stands for.
    """

    values: Values
    weight: int
    metrics: LocalMetrics = field(default_factory=LocalMetrics)


def encode_update(update: Update, *, signed_plan: SignedPlan, layout: Layout) -> bytes:
    """The frame of an update.

    Raises:
        UpdateLayoutError: the values are not as many as the layout wants, or of another tier.
        UpdateValueError: no code stands for a value of a layout that quantises.
    """
    import numpy as np

    if update.values.shape != (layout.count,):
        raise UpdateLayoutError(f"update: expected {layout.count} values, got shape {update.values.shape}")
    m = update.metrics
    if m.tier != layout.tier:
        raise UpdateLayoutError(f"update: expected tier {layout.tier}, got {m.tier}")
    measured = (m.loss_start, m.loss_end, m.eval_loss, m.seconds, m.peak_private_mb, m.peak_total_mb)
    header = _HEADER.pack(
        MAGIC,
        layout.version,
        layout.tier,
        signed_plan.plan.round,
        bytes.fromhex(signed_plan.digest),
        layout.digest(),
        layout.count,
    )
    trailer = _TRAILER.pack(
        update.weight,
        m.steps,
        m.eval_examples,
        m.eval_correct,
        *(math.nan if value is None else value for value in measured),
    )
    if layout.quantisation is None:
        return header + np.ascontiguousarray(update.values, dtype="<f4").tobytes() + trailer
    try:
        return header + encode_codes(update.values, layout.sizes, layout.quantisation) + trailer
    except ValueError as error:
        raise UpdateValueError(f"update: values: {error}") from error


def layout_for(data: bytes, layouts: Sequence[Layout]) -> Layout:
    """The layout of the tier that a frame claims; that of tier 0 for a frame with which anything is wrong.

    Args:
        data: The frame, not checked yet.
        layouts: Of the plan's tiers, at least one.
    """
    if len(data) < _HEADER.size:
        return layouts[0]
    tier = _HEADER.unpack_from(data)[2]
    return layouts[tier] if tier < len(layouts) else layouts[0]


def decode_update(data: bytes, *, signed_plan: SignedPlan, layout: Layout) -> Update:
    """Check and read a frame; float32 values are a view of ``data``.

    Raises:
        UpdateFormatError: magic, version, tier or length.
        UpdatePlanError: another round or plan.
        UpdateLayoutError: other blocks than the plan's.
        UpdateValueError: NaN, infinity, a value over ``max_abs``, a code that is none, a weight of zero, or more
            examples right than tried.
        UpdateNormError: the change is larger as a whole than the plan allows.
    """
    if len(data) < _HEADER.size + _TRAILER.size:
        raise UpdateFormatError(f"update: length: expected {layout.frame_bytes} bytes, got {len(data)}")
    magic, version, tier, round_, plan_digest, layout_digest, count = _HEADER.unpack_from(data)
    if (magic, version) != (MAGIC, layout.version):
        raise UpdateFormatError(f"update: expected {MAGIC!r} version {layout.version}, got {magic!r} version {version}")
    if tier != layout.tier:
        raise UpdateFormatError(f"update: tier: expected {layout.tier}, or another one of the plan's, got {tier}")
    plan = signed_plan.plan
    if (round_, plan_digest.hex()) != (plan.round, signed_plan.digest):
        raise UpdatePlanError(
            f"update: expected round {plan.round} of plan {signed_plan.digest[:12]}, "
            f"got {round_} of {plan_digest.hex()[:12]}"
        )
    if layout_digest != layout.digest() or count != layout.count:
        raise UpdateLayoutError(
            f"update: expected {layout.count} values of layout {layout.digest().hex()[:12]}, "
            f"got {count} of {layout_digest.hex()[:12]}"
        )
    if len(data) != layout.frame_bytes:
        raise UpdateFormatError(f"update: length: expected {layout.frame_bytes} bytes, got {len(data)}")
    weight, steps, examples, correct, *measured = _TRAILER.unpack_from(data, len(data) - _TRAILER.size)
    values = _read_values(data, layout)
    check_values(values, weight, plan.update)
    if correct > examples:
        raise UpdateValueError(f"update: metrics: expected at most {examples} correct examples, got {correct}")
    known = (value if math.isfinite(value) else None for value in measured)
    metrics = LocalMetrics(steps, examples, correct, *known)
    return Update(values, weight, replace(metrics, tier=tier))


def _read_values(data: bytes, layout: Layout) -> Values:
    """The payload of a frame of the right length."""
    import numpy as np

    if layout.quantisation is None:
        return np.frombuffer(data, dtype="<f4", count=layout.count, offset=_HEADER.size)
    payload = memoryview(data)[_HEADER.size : -_TRAILER.size]
    try:
        return decode_codes(payload, layout.sizes, layout.quantisation)
    except ValueError as error:
        raise UpdateValueError(f"update: values: {error}") from error


def check_values(values: Values, weight: int, rules: UpdateRules) -> None:
    """Demand finite values within the plan's bounds and a positive weight.

    Raises:
        UpdateValueError: naming what is wrong with the weight or with one of the values.
        UpdateNormError: the values are too large together.
    """
    if weight < 1:
        raise UpdateValueError(f"update: weight: expected at least 1, got {weight}")
    # One pass each and no temporary copy: NaN makes min and max NaN, infinity fails the bound.
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (low >= -rules.max_abs and high <= rules.max_abs):
        raise UpdateValueError(f"update: values: expected finite and within ±{rules.max_abs}, got {low} to {high}")
    if rules.max_norm is not msgspec.UNSET and (norm := norm_of(values)) > rules.max_norm:
        raise UpdateNormError(f"update: norm: expected at most {rules.max_norm:g}, got {norm:g}")


def norm_of(values: Values) -> float:
    """L2 norm of finite values, summed in float64 so that its last digits alone depend on the machine."""
    import numpy as np

    squares = 0.0
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK].astype(np.float64)
        squares += float(np.dot(part, part))
    return math.sqrt(squares)
