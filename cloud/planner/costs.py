"""What a round costs a device in bytes, up and down, from what its plan keeps alive. Pure.

Up goes the sealed update: envelope, frame, the alive factors and the head if it is trained. Down come the plan and a
patch with what the round makes of the adapter: both factors of every component that lived in it, as ``anneal`` writes
both anew, and the head, in plain codes: how short deflated differences are depends on what is learned. A device that
was away for longer fetches what those rounds changed besides. HTTP's own headers, the first download, the plan that
ends the task and the round that measures class means are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import msgspec

from cloud.planner.aggregation import AGGREGATIONS
from cloud.planner.tiers import Tiers, plan_tiers
from edge_runtime import wire
from edge_runtime.bundle import Manifest
from edge_runtime.wire.codes import UpdateBits, packed_bytes
from edge_runtime.wire.envelope import OVERHEAD_BYTES
from edge_runtime.wire.patch_frame import PatchBits, component_counts, patch_bytes
from edge_runtime.wire.plan import SCHEMA

_SIGNATURE_BYTES = 64
_SCALE_BYTES = 4
_LONGEST = -2.2250738585072014e-308  # no float64 has more characters in JSON


@dataclass(frozen=True)
class Component:
    """One component of a module: its parameters, and the most bytes it adds to an update and to a patch."""

    parameters: int
    up: int
    down: int

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.up + self.down


@dataclass(frozen=True)
class Traffic:
    """What the bytes of a round depend on besides what lives in it."""

    manifest: Manifest
    task: str
    aggregation: str
    rank: int  # of the task
    head_trained: bool
    upload: UpdateBits
    download: PatchBits
    # An update of any other tier than 0 is smaller, so these only make plans longer.
    tiers: Tiers = field(default_factory=Tiers)
    upload_density: float = 1.0

    @cached_property
    def components(self) -> tuple[Component, ...]:
        """One of every module, in plan order. Codes are counted as if each component began at a byte."""
        return tuple(self._component(*self.manifest.features[name]) for name in self.manifest.module_names)

    def components_from(self, block: int) -> tuple[Component, ...]:
        """Those of the modules of a block and of the ones above it."""
        modules = zip(self.manifest.modules, self.components, strict=True)
        return tuple(component for module, component in modules if module.block >= block)

    @property
    def head(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the head's tensors where it is trained."""
        return self.manifest.head_shapes if self.head_trained else {}

    def _component(self, in_features: int, out_features: int) -> Component:
        sizes = {"A": in_features, "B": out_features}
        ups = [sum(self._up_bytes(sizes[f]) for f in alive) for alive in AGGREGATIONS[self.aggregation]]
        down = sum(_value_bytes(size, self.download) for size in sizes.values())
        scales = 0 if self.download == 32 else _SCALE_BYTES * len(sizes)
        return Component(in_features + out_features, max(ups), down + scales)

    def _up_bytes(self, values: int) -> int:
        if self.upload_density == 1:
            return _value_bytes(values, self.upload)
        # A position has at most two bits more than the logarithm of how many values there are for each that is held.
        bits = self.upload + 2 + max(0.0, math.log2(1 / self.upload_density))
        return math.ceil(values * self.upload_density * bits / 8)

    @property
    def quantisation(self) -> wire.Quantisation | msgspec.UnsetType:
        """As plans have it, but for the ranges."""
        if self.upload == 32:
            return msgspec.UNSET
        return wire.Quantisation.of(self.upload, (), self.upload_density)


def update_bytes(traffic: Traffic, modules: Sequence[wire.ModulePlan]) -> int:
    """Exact length of a sealed update to a plan with these modules."""
    layout = wire.layout_of(modules, traffic.manifest.features, traffic.head)
    if traffic.quantisation:
        layout = replace(layout, quantisation=traffic.quantisation)
    return layout.frame_bytes + OVERHEAD_BYTES


def result_bytes(traffic: Traffic, modules: Sequence[wire.ModulePlan]) -> int:
    """Length of a plain patch with the components that live, of both factors, and with the trained head."""
    ranks = {module.name: module.rank for module in modules}
    layout = wire.adapter_layout(ranks, traffic.manifest.features, traffic.manifest.head_shapes)
    counts = component_counts(layout)
    living = {
        f"{module.name}.lora_{factor}": len(module.trained_components)
        for module in modules
        if module.alive
        for factor in "ab"
    }
    return patch_bytes(living | {name: counts[name] for name in traffic.head}, layout, traffic.download)


def plan_bytes(traffic: Traffic, modules: Sequence[wire.ModulePlan]) -> int:
    """The most a signed plan with these modules has: one with the longest numbers is encoded."""
    whole = 2**63 - 1
    small = 2**31
    rates = dict.fromkeys(("lr_a", "lr_b", "lr_head", "weight_decay", "beta1", "beta2", "eps", "mu"), _LONGEST)
    blocks = sum(len(module.alive) for module in modules) + len(traffic.head)
    plan = wire.Plan(
        schema=SCHEMA,
        task=traffic.task,
        round=small,
        rounds=small,
        state="train",
        bundle="0" * 64,
        adapter="0" * 64,
        adapter_bytes=whole,
        modules=tuple(modules),
        head_alive=False,  # a letter longer than true
        training=wire.Training(
            batch_size=small,
            max_tokens=small,
            **rates,
            steps=small,
            epochs=small,
            clip_norm=_LONGEST,
            products="int8",
            local_kill=_LONGEST,
            example_share=_LONGEST,
        ),
        update=wire.UpdateRules(weight_cap=small, max_devices=small, max_norm=_LONGEST),
        seed=whole,
        deadline=_LONGEST,
        round_key="0" * 64,
        min_examples=small,
        personal=("head",),
        tiers=plan_tiers(traffic.tiers, traffic.manifest, modules),
        quantisation=_with_ranges(traffic.quantisation, blocks),
    )
    return _SIGNATURE_BYTES + len(msgspec.json.encode(plan))


def _with_ranges(
    quantisation: wire.Quantisation | msgspec.UnsetType, blocks: int
) -> wire.Quantisation | msgspec.UnsetType:
    """With the longest numbers."""
    if quantisation is msgspec.UNSET:
        return quantisation
    density = msgspec.UNSET if quantisation.density is msgspec.UNSET else _LONGEST
    return msgspec.structs.replace(quantisation, ranges=(_LONGEST,) * blocks, density=density)


def fixed_bytes(traffic: Traffic, *, lists_components: bool) -> int:
    """The most a round costs before anything of a module is in it: headers, the longest plan, and the head.

    Args:
        traffic: What is sent how.
        lists_components: Whether plans may name the components that are trained.
    """
    alive = max(AGGREGATIONS[traffic.aggregation], key=len)
    listed = tuple(range(1, traffic.rank)) if lists_components and traffic.rank > 1 else msgspec.UNSET
    longest = [wire.ModulePlan(name, traffic.rank, alive, listed) for name in traffic.manifest.module_names]
    dead = [wire.ModulePlan(name, traffic.rank, "") for name in traffic.manifest.module_names]
    return update_bytes(traffic, dead) + result_bytes(traffic, dead) + plan_bytes(traffic, longest)


def _value_bytes(count: int, bits: UpdateBits) -> int:
    return 4 * count if bits == 32 else packed_bytes(count, bits)
