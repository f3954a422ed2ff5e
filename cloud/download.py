"""What devices download: the published form of the master adapter, and patches from one plan's form to another's.

The *master* is float32 and is what means are added to. The *published* adapter is what plans name and devices train
from: the master itself, or the master with every component that the task has changed quantised and restored. As the
mean is added to the master, the rounding of one round is not carried into the next (a straight-through estimate).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from edge_runtime import wire
from edge_runtime.bundle import Array, Bundle, Manifest, adapter_shapes, cut_ranks
from edge_runtime.wire.components import component_axis, lying, rounded, scale_count
from edge_runtime.wire.patch import change_of
from edge_runtime.wire.patch_frame import OWN, PatchBits, component_counts

KEPT_PATCHES = 4  # of one plan: from the round before, from the bundle, and from two others
KEPT_ADAPTERS = 16  # a device that was away for longer is sent codes in place of differences

PatchKey = tuple[int, bool]  # round it starts from, or OWN; whether the device reads deflated codes

# The first round whose plan names an adapter with this very tensor, or of each of its components where they differ;
# OWN for what is the bundle's.
Since = int | tuple[int, ...]


@dataclass(frozen=True)
class Published:
    """A published adapter and since when it has each of its components.

    Attributes:
        tensors: Float32 by name.
        changed: For every tensor in the adapter's order, see :func:`tensor_names`.
    """

    tensors: dict[str, Array]
    changed: tuple[Since, ...]


def tensor_names(manifest: Manifest) -> tuple[str, ...]:
    """The tensors of an adapter in the order of a patch."""
    return tuple(adapter_shapes(manifest, dict.fromkeys(manifest.module_names, 1)))


def own_adapter(bundle: Bundle, ranks: Mapping[str, int]) -> Published:
    """The bundle's adapter, cut to the first plan's ranks, as what was published before it: a device cuts its own."""
    manifest = bundle.manifest
    return Published(cut_ranks(manifest, bundle.initial_adapter(), ranks), (OWN,) * len(tensor_names(manifest)))


def publish_master(
    manifest: Manifest, before: Published, master: Mapping[str, Array], *, round_: int, bits: PatchBits
) -> Published:
    """The published form of a master.

    Args:
        manifest: The bundle's.
        before: What the plan before named, or :func:`own_adapter`.
        master: The adapter of the new plan, float32 by name.
        round_: Of the new plan.
        bits: 32 for the master itself; otherwise what is still the bundle's stays so to the bit.
    """
    tensors, changed = {}, []
    for name, since in zip(tensor_names(manifest), before.changed, strict=True):
        tensors[name], dated = _publish(name, since, before.tensors[name], master[name], round_=round_, bits=bits)
        changed.append(dated)
    return Published(tensors, tuple(changed))


def _publish(name: str, since: Since, old: Array, new: Array, *, round_: int, bits: PatchBits) -> tuple[Array, Since]:
    """The published form of one tensor, and since when it is that.

    A component that is still the bundle's stays so to the bit. A tensor of another shape is new altogether: no device
    has one with the components that it keeps.
    """
    if old.shape != new.shape:
        return new if bits == 32 else rounded(name, new, bits), round_
    dates = _dates(since, scale_count(name, new.shape) or 1)
    if bits != 32 and scale_count(name, new.shape):
        own = np.array([date == OWN and same for date, same in zip(dates, _same(name, old, new), strict=True)])
        new = np.where(lying(name, own), new, rounded(name, new, bits))
    dates = tuple(date if same else round_ for date, same in zip(dates, _same(name, old, new), strict=True))
    return new, dates[0] if len(set(dates)) == 1 else dates


def make_patch(
    bundle: Bundle,
    plan: wire.Plan,
    published: Published,
    key: PatchKey,
    *,
    older: Mapping[str, Array] | None,
    bits: PatchBits,
) -> bytes:
    """The patch to the adapter of ``plan``, which is ``published``.

    In ``bits`` where that gives the very tensors; else, as for a while after the operator has chosen others, in 32.

    Args:
        bundle: The task's.
        plan: Whose adapter it makes.
        published: That adapter.
        key: From which round's, and for which device.
        older: The adapter it starts from, where it is here: then it may be of differences.
        bits: Of a code.
    """
    since, deflated = key
    manifest = bundle.manifest
    layout = wire.adapter_layout(plan.ranks, manifest.features, manifest.head_shapes)
    changes = {}
    for (name, count), at in zip(component_counts(layout).items(), published.changed, strict=True):
        if numbers := [number for number, date in enumerate(_dates(at, count)) if date > since]:
            changes[name] = change_of(name, published.tensors[name], numbers)
    head = wire.PatchHead(since, plan.round, plan.adapter, wire.fewest_bits(changes, bits))
    return wire.encode_patch(head, changes, layout, older=older, deflated=deflated)


class RecentAdapters:
    """The digests of the adapters that the last plans name, by round: what is kept on the disk and may be fetched.

    Two where patches have whole values; with codes more, for a patch is of differences where its start is here.
    """

    def __init__(self, bits: PatchBits) -> None:
        self._kept = 2 if bits == 32 else KEPT_ADAPTERS
        self._digests: dict[int, str] = {}

    def add(self, round_: int, digest: str) -> None:
        """The plan of this round, the newest, names this adapter; what is too old is forgotten."""
        self._digests[round_] = digest
        for old in sorted(self._digests)[: -self._kept]:
            del self._digests[old]

    def recall(self, history: Iterable[wire.RoundStatus]) -> None:
        """Those that rounds of the past made, which the plans after them name."""
        for ended in history:
            self.add(ended.round + 1, ended.adapter)

    def of(self, round_: int) -> str | None:
        """The digest of what a round's plan names, unless it is too old."""
        return self._digests.get(round_)

    @property
    def digests(self) -> set[str]:
        """All of them."""
        return set(self._digests.values())


class PatchBook:
    """The patches to one plan's adapter, each made when it is first asked for.

    Devices that take part in every round all ask for the same one. No more than ``KEPT_PATCHES`` are in memory, those
    last asked for, and one is made at a time.
    """

    def __init__(self, make: Callable[[PatchKey], bytes]) -> None:
        self._make = make
        self._made: OrderedDict[PatchKey, bytes] = OrderedDict()
        self._lock = asyncio.Lock()

    async def get(self, key: PatchKey) -> bytes:
        """The patch from this round's adapter for such a device."""
        async with self._lock:
            if key not in self._made:
                self._made[key] = await asyncio.to_thread(self._make, key)
            self._made.move_to_end(key)
            if len(self._made) > KEPT_PATCHES:
                self._made.popitem(last=False)
            return self._made[key]


def _dates(since: Since, count: int) -> tuple[int, ...]:
    """A date for each of so many components."""
    return (since,) * count if isinstance(since, int) else since


def _same(name: str, old: Array, new: Array) -> list[bool]:
    """Which components of two tensors of one shape are the same to the bit."""
    if not scale_count(name, new.shape):
        return [old.tobytes() == new.tobytes()]
    bits = [np.ascontiguousarray(array, np.float32).view(np.uint32) for array in (old, new)]
    return [bool(same) for same in (bits[0] == bits[1]).all(axis=1 - component_axis(name))]
