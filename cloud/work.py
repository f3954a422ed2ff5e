"""The open round in memory: its plan, its key, the sum of what came, and how an update gets in, and out again.

Functions here take no lock and touch no disk; they are what runs in worker threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloud.aggregate import Imprint, ProductMean, RoundSum, Sketcher, apply_mean
from cloud.errors import DataMissingError
from cloud.measuring import with_class_means
from cloud.outliers import Outliers, Verdict, judge
from cloud.planning import plan_layouts
from cloud.store import UpdateRecord
from edge_runtime import wire
from edge_runtime.bundle import Array, Bundle, Manifest, adapter_ranks, adapter_shapes, check_tensors, parse_tensors
from edge_runtime.wire.envelope import OVERHEAD_BYTES


@dataclass(frozen=True)
class RoundWork:
    """Everything needed to take updates to one plan; the private key is gone with this object.

    Attributes:
        signed: The plan.
        layouts: Of its tiers.
        opened: When the round was, Unix seconds.
        total: The sum of what came.
        key: The round's.
        sketcher: Of what came, where it is to be judged; None where nobody is.
        imprints: Of what came, by device.
        aside: Devices whose updates came and are not in ``total``, once the round is closed.
    """

    signed: wire.SignedPlan
    layouts: tuple[wire.Layout, ...]
    opened: float
    total: RoundSum
    key: X25519PrivateKey = field(repr=False)
    sketcher: Sketcher | None = field(default=None, repr=False)
    imprints: dict[str, Imprint] = field(default_factory=dict, repr=False)
    aside: frozenset[str] = frozenset()

    @property
    def layout(self) -> wire.Layout:
        """Of updates that carry the whole plan."""
        return self.layouts[0]

    @property
    def sealed_bytes(self) -> tuple[int, ...]:
        """The exact lengths that a sealed update to this plan may have, falling."""
        return tuple(sorted({layout.frame_bytes + OVERHEAD_BYTES for layout in self.layouts}, reverse=True))

    def add(self, device: str, update: wire.Update, imprint: Imprint | None) -> None:
        """Add a checked update of a device that has none in the round yet, and keep its imprint."""
        self.total.add(update)
        if imprint is not None:
            self.imprints[device] = imprint

    def imprint(self, update: wire.Update) -> Imprint | None:
        """What is kept of a checked update; None where nobody is judged."""
        return None if self.sketcher is None else self.sketcher.imprint(update)


def start_work(
    bundle: Bundle, signed: wire.SignedPlan, *, key: X25519PrivateKey, opened: float, judged: bool = False
) -> RoundWork:
    """An empty round of this plan, whose updates are ``judged`` or not.

    Sums that devices measure are never: they grow with the examples of a device, and point where its classes do.
    """
    layouts = plan_layouts(bundle, signed.plan)
    judged = judged and signed.plan.state == "train"
    sketcher = Sketcher(layouts, key.private_bytes_raw()) if judged else None
    return RoundWork(signed, layouts, opened, RoundSum(layouts, signed.plan.update), key, sketcher)


def open_update(work: RoundWork, device: str, sealed: bytes) -> wire.Update:
    """Open and check a sealed update.

    Raises:
        EnvelopeError, UpdateFormatError, UpdatePlanError, UpdateLayoutError, UpdateValueError, UpdateNormError: what is
            wrong with it.
    """
    context = wire.EnvelopeContext.of(work.signed, device)
    frame = wire.unseal(sealed, round_key=work.key, context=context)
    update = wire.decode_update(frame, signed_plan=work.signed, layout=wire.layout_for(frame, work.layouts))
    if work.signed.plan.state == "measure":
        wire.check_measurement(update, work.layout)
    return update


def open_stored(work: RoundWork, stored: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, wire.Update]]:
    """Open counted updates once more, one at a time, each with its device.

    Args:
        work: Their round.
        stored: Device and sealed update.

    Raises:
        DataMissingError: an update that was opened before no longer opens.
    """
    for device, sealed in stored:
        try:
            yield device, open_update(work, device, sealed)
        except wire.UpdateError as error:
            raise DataMissingError(f"stored {error}") from error


def without_outliers(
    work: RoundWork,
    updates: Sequence[UpdateRecord],
    sealed: Callable[[Sequence[UpdateRecord]], Iterable[tuple[str, bytes]]],
    *,
    rule: Outliers,
    least: int,
) -> tuple[RoundWork, Verdict | None]:
    """A closed round without the updates that its operator's rule sets aside, and the verdict; None: nobody is judged.

    ``work`` stays as it is, so that this can be done again when what follows fails.

    Args:
        work: Of the round; every update is in it.
        updates: All of them.
        sealed: Reads stored updates: device and sealed bytes.
        rule: The operator's.
        least: Devices that have to stay.

    Raises:
        DataMissingError: an update that is to be taken out again is not in the store, or damaged.
    """
    if work.sketcher is None:
        return work, None
    verdict = judge(work.imprints, rule, least=least)
    if not verdict.aside:
        return work, verdict
    gone = open_stored(work, sealed([update for update in updates if update.receipt.device in verdict.aside]))
    total = work.total.without(update for _, update in gone)
    return replace(work, total=total, aside=verdict.aside), verdict


def read_adapter(bundle: Bundle, data: bytes) -> dict[str, Array]:
    """The tensors of an adapter file of this bundle, whatever its ranks.

    Raises:
        TensorFileError: it is not one.
    """
    tensors = parse_tensors(data, what="adapter")
    check_tensors(tensors, adapter_shapes(bundle.manifest, adapter_ranks(bundle.manifest, tensors)), what="adapter")
    return tensors


def next_adapter(
    manifest: Manifest,
    master: dict[str, Array],
    work: RoundWork,
    updates: Iterable[tuple[str, wire.Update]] | None = None,
) -> dict[str, Array]:
    """The round's master adapter moved by the round's mean, or with the head that was measured.

    Args:
        manifest: The bundle's.
        master: What the round started from.
        work: The round; every update that counts is summed.
        updates: All that count, one by one with their devices, where a module that trained both factors is to be the
            mean of the devices' products instead of the product of the factors' means.
    """
    if work.signed.plan.state == "measure":
        return with_class_means(manifest, master, work.layout, work.total.sums())
    averaged = apply_mean(master, work.layout, work.total.mean())
    if updates is None:
        return averaged
    products = ProductMean(master, work.layout)
    for _, update in updates:
        products.add(update.values, work.total.capped(update.weight) / work.total.weight)
    return averaged | products.factors()
