"""The open round in memory: its plan, its key, the sum of what came, and how an update gets in.

Functions here take no lock and touch no disk; they are what runs in worker threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloud.aggregate import ProductMean, RoundSum, apply_mean
from cloud.errors import DataMissingError
from cloud.measuring import with_class_means
from cloud.planning import plan_layouts
from edge_runtime import wire
from edge_runtime.bundle import Array, Bundle, Manifest, adapter_ranks, adapter_shapes, check_tensors, parse_tensors
from edge_runtime.wire.envelope import OVERHEAD_BYTES


@dataclass(frozen=True)
class RoundWork:
    """Everything needed to take updates to one plan; the private key is gone with this object."""

    signed: wire.SignedPlan
    layouts: tuple[wire.Layout, ...]  # of the plan's tiers
    opened: float
    total: RoundSum
    key: X25519PrivateKey = field(repr=False)

    @property
    def layout(self) -> wire.Layout:
        """Of updates that carry the whole plan."""
        return self.layouts[0]

    @property
    def sealed_bytes(self) -> tuple[int, ...]:
        """The exact lengths that a sealed update to this plan may have, falling."""
        return tuple(sorted({layout.frame_bytes + OVERHEAD_BYTES for layout in self.layouts}, reverse=True))


def start_work(bundle: Bundle, signed: wire.SignedPlan, *, key: X25519PrivateKey, opened: float) -> RoundWork:
    """An empty round of this plan."""
    layouts = plan_layouts(bundle, signed.plan)
    return RoundWork(signed, layouts, opened, RoundSum(layouts, signed.plan.update), key)


def open_update(work: RoundWork, device: str, sealed: bytes) -> wire.Update:
    """Open and check a sealed update.

    Raises:
        EnvelopeError, UpdateFormatError, UpdatePlanError, UpdateLayoutError, UpdateValueError: what is wrong with it.
    """
    context = wire.EnvelopeContext.of(work.signed, device)
    frame = wire.unseal(sealed, round_key=work.key, context=context)
    update = wire.decode_update(frame, signed_plan=work.signed, layout=wire.layout_for(frame, work.layouts))
    if work.signed.plan.state == "measure":
        wire.check_measurement(update, work.layout)
    return update


def open_stored(work: RoundWork, stored: Iterable[tuple[str, bytes]]) -> Iterator[wire.Update]:
    """Open counted updates once more, one at a time.

    Args:
        work: Their round.
        stored: Device and sealed update.

    Raises:
        DataMissingError: an update that was opened before no longer opens.
    """
    for device, sealed in stored:
        try:
            yield open_update(work, device, sealed)
        except wire.UpdateError as error:
            raise DataMissingError(f"stored {error}") from error


def read_adapter(bundle: Bundle, data: bytes) -> dict[str, Array]:
    """The tensors of an adapter file of this bundle, whatever its ranks.

    Raises:
        TensorFileError: it is not one.
    """
    tensors = parse_tensors(data, what="adapter")
    check_tensors(tensors, adapter_shapes(bundle.manifest, adapter_ranks(bundle.manifest, tensors)), what="adapter")
    return tensors


def next_adapter(
    manifest: Manifest, master: dict[str, Array], work: RoundWork, updates: Iterable[wire.Update] | None = None
) -> dict[str, Array]:
    """The round's master adapter moved by the round's mean, or with the head that was measured.

    Args:
        manifest: The bundle's.
        master: What the round started from.
        work: The round; every update is summed.
        updates: All of them, one by one, where a module that trained both factors is to be the mean of the devices'
            products instead of the product of the factors' means.
    """
    if work.signed.plan.state == "measure":
        return with_class_means(manifest, master, work.layout, work.total.sums())
    averaged = apply_mean(master, work.layout, work.total.mean())
    if updates is None:
        return averaged
    products = ProductMean(master, work.layout)
    for update in updates:
        products.add(update.values, work.total.capped(update.weight) / work.total.weight)
    return averaged | products.factors()
