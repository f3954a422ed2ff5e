"""What devices download: the published form of the master adapter, and patches from one plan's form to another's.

The *master* is float32 and is what means are added to. The *published* adapter is what plans name and devices train
from: the master itself, or the master with every tensor that the task has changed quantised and restored. As the mean
is added to the master, the rounding of one round is not carried into the next (a straight-through estimate).
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_runtime import wire
from edge_runtime.bundle import Array, Bundle, Manifest, adapter_shapes, cut_ranks
from edge_runtime.wire.components import rounded
from edge_runtime.wire.patch import OWN, PatchBits

KEPT_PATCHES = 4  # of one plan: from the round before, from the bundle, and from two others


@dataclass(frozen=True)
class Published:
    """A published adapter and since when it has each of its tensors.

    Attributes:
        tensors: Float32 by name.
        changed: For every tensor in the adapter's order (see :func:`tensor_names`) the first round whose plan names an
            adapter with this very tensor; OWN for one that is the bundle's.
    """

    tensors: dict[str, Array]
    changed: tuple[int, ...]


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
        old, new = before.tensors[name], master[name]
        if bits != 32 and not (since == OWN and _same(old, new)):
            new = rounded(name, new, bits)
        tensors[name] = new
        changed.append(since if _same(old, new) else round_)
    return Published(tensors, tuple(changed))


def make_patch(bundle: Bundle, plan: wire.Plan, published: Published, *, since: int, bits: PatchBits) -> bytes:
    """The patch from the adapter of round ``since`` to that of ``plan``, which is ``published``.

    In ``bits`` where that gives the very tensors; else, as for a while after the operator has chosen others, in 32.
    """
    manifest = bundle.manifest
    dated = zip(tensor_names(manifest), published.changed, strict=True)
    changed = {name: published.tensors[name] for name, at in dated if at > since}
    layout = wire.adapter_layout(plan.ranks, manifest.features, manifest.head_shapes)
    head = wire.PatchHead(since, plan.round, plan.adapter, wire.fewest_bits(changed, bits))
    return wire.encode_patch(head, changed, layout)


class PatchBook:
    """The patches to one plan's adapter, each made when it is first asked for.

    Devices that take part in every round all ask for the same one. No more than ``KEPT_PATCHES`` are in memory, those
    last asked for, and one is made at a time.
    """

    def __init__(self, make: Callable[[int], bytes]) -> None:
        self._make = make
        self._made: OrderedDict[int, bytes] = OrderedDict()
        self._lock = asyncio.Lock()

    async def get(self, since: int) -> bytes:
        """The patch from the adapter of round ``since``."""
        async with self._lock:
            if since not in self._made:
                self._made[since] = await asyncio.to_thread(self._make, since)
            self._made.move_to_end(since)
            if len(self._made) > KEPT_PATCHES:
                self._made.popitem(last=False)
            return self._made[since]


def _same(old: Array, new: Array) -> bool:
    return old.shape == new.shape and old.tobytes() == new.tobytes()
