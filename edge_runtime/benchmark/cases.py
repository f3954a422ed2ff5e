"""What is measured: the settings of a bundle, and the job that a child process is given for one of them."""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_runtime.bundle import Manifest
from edge_runtime.wire import ModulePlan, Products

Memory = Literal["keep", "recompute"]
Tier = Literal["full", "upper half", "upper sixth"]

# Share of the blocks that are alive, counted from the top. Below the lowest alive block there is no backward pass, so
# these are the steps by which a device that is too small for a model can take part in training it.
TIERS: dict[Tier, float] = {"full": 1.0, "upper half": 1 / 2, "upper sixth": 1 / 6}


class Setting(msgspec.Struct, frozen=True):
    """One way to train: both factors of every module of the uppermost blocks are alive, and the head.

    ``keep``: activations are kept as far as the memory budget goes. ``recompute``: a budget of 0, the least memory.
    """

    tier: Tier
    blocks_alive: int
    rank: int
    memory: Memory
    products: Products


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a child measures: :class:`~edge_runtime.benchmark.report.Figures`, only the peak, or operators."""

    measure: Literal["figures", "peak", "operators"]
    bundle: str  # folder
    setting: Setting
    batch_size: int  # examples
    tokens: int  # of each example
    threads: int | None  # None: one a core
    memory_budget_mb: int | None  # of setting ``keep``; None: the engine's default
    min_steps: int  # timed steps, however long they take
    max_steps: int
    seconds: float  # no further step is begun after this


def settings_of(manifest: Manifest, *, quick: bool) -> tuple[Setting, ...]:
    """Every tier with activations kept and recomputed, at the bundle's rank and half of it, and with int8 products.

    int8 products are measured at the bundle's rank only, and where the bundle has them. A tier of as many blocks as
    the one above it is left out. ``quick`` leaves out the second rank and int8.
    """
    ranks = dict.fromkeys((manifest.r_max, max(1, manifest.r_max // 2)))
    ways: list[tuple[int, Products]] = [(rank, "exact") for rank in ranks]
    if all(kind.fast is not None for kind in manifest.kinds):
        ways.append((manifest.r_max, "int8"))
    memories: tuple[Memory, ...] = ("keep", "recompute") if manifest.engine == "blocks" else ("keep",)
    return tuple(
        Setting(tier, alive, rank, memory, products)
        for tier, alive in _alive_blocks(len(manifest.blocks)).items()
        for rank, products in (ways[:1] if quick else ways)
        for memory in memories
    )


def plan_of(manifest: Manifest, setting: Setting) -> list[ModulePlan]:
    """The modules of a plan with this setting, in plan order."""
    lowest = len(manifest.blocks) - setting.blocks_alive
    return [
        ModulePlan(module.name, setting.rank, "AB" if module.block >= lowest else "") for module in manifest.modules
    ]


def next_plan_of(manifest: Manifest, setting: Setting) -> list[ModulePlan]:
    """A plan that differs in every alive block: half the rank, and of each block in turn only A or only B alive."""
    lowest = len(manifest.blocks) - setting.blocks_alive
    return [
        ModulePlan(
            module.name,
            max(1, setting.rank // 2),
            ("A" if module.block % 2 else "B") if module.block >= lowest else "",
        )
        for module in manifest.modules
    ]


def _alive_blocks(blocks: int) -> dict[Tier, int]:
    """Alive blocks of each tier, at least one."""
    found: dict[Tier, int] = {}
    for tier, share in TIERS.items():
        alive = max(1, round(blocks * share))
        if alive not in found.values():
            found[tier] = alive
    return found
