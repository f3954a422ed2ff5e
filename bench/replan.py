"""What a new plan costs the engine before its first step: ``python -m bench.replan BUNDLE THREADS REPEATS``.

A plan with other ranks and another alive set in every block is taken, and one step is made. What that took beyond the
same step afterwards is the price of the change: binding the adapter, cutting graphs, opening sessions. The batch is
one sequence of eight tokens, so that little else is in the difference.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Literal

import msgspec
import numpy as np

from edge_runtime.bundle import Manifest, Module, cut_ranks, open_bundle
from edge_runtime.data import Batch
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import ModulePlan

TOKENS = 8
_STEPS = 5

Alive = Literal["", "A", "B", "AB"]

# Eight ways for a Llama block to be alive, one a block in turn: q, k, v, o, gate, up, down.
PATTERNS: tuple[tuple[Alive, ...], ...] = (
    ("A",) * 7,
    ("B",) * 7,
    ("AB", "AB", "AB", "AB", "", "", ""),
    ("", "", "", "", "AB", "AB", "AB"),
    ("", "AB", "", "AB", "", "AB", ""),
    ("A", "A", "A", "A", "B", "B", "B"),
    ("", "", "B", "", "", "", ""),
    ("",) * 7,  # the gradient only passes through
)


class Change(msgspec.Struct, frozen=True):
    """One change of plan, in milliseconds."""

    use_ms: float  # BlockEngine.use
    first_step_ms: float
    step_ms: float  # median of the steps after the first

    @property
    def cost_ms(self) -> float:
        """What the change took beyond a step."""
        return self.use_ms + self.first_step_ms - self.step_ms


class Changes(msgspec.Struct, frozen=True):
    """Changes to patterns never seen before, and to patterns whose sessions exist; an entry a repeat."""

    engine_ms: tuple[float, ...]  # opening the bundle's graphs and mapping its weights, once a process
    first: tuple[Change, ...]
    again: tuple[Change, ...]


def patterned(manifest: Manifest, rank: int) -> list[ModulePlan]:
    """A plan in which block i has pattern i modulo eight; all modules have ``rank``."""
    slots = {kind.name: [slot.name for slot in kind.slots] for kind in manifest.kinds}

    def alive(module: Module) -> Alive:
        place = slots[manifest.blocks[module.block].kind].index(module.slot)
        return PATTERNS[module.block % len(PATTERNS)][place]

    return [ModulePlan(module.name, rank, alive(module)) for module in manifest.modules]


def measure(folder: Path, threads: int, repeats: int) -> Changes:
    """Make the changes ``repeats`` times, each on an engine that has seen only a plan with everything alive."""
    bundle = open_bundle(folder, verify=False)
    manifest = bundle.manifest
    everything = [ModulePlan(module.name, manifest.r_max, "AB") for module in manifest.modules]
    engines, first, again = [], [], []
    for _ in range(repeats):
        work = WorkingBundle(bundle, threads=threads)
        began = time.perf_counter()
        _ = work.engine
        engines.append(_ms(began))
        _take(work, everything)
        first.append(_take(work, patterned(manifest, manifest.r_max // 2)))
        _take(work, everything)
        again.append(_take(work, patterned(manifest, manifest.r_max - 1)))
    return Changes(tuple(engines), tuple(first), tuple(again))


def _take(work: WorkingBundle, plan: list[ModulePlan]) -> Change:
    ranks = {module.name: module.rank for module in plan}
    adapter = cut_ranks(work.bundle.manifest, work.bundle.initial_adapter(), ranks)
    parameters = AdapterParameters(adapter, work.layout(plan, head_alive=False))
    ids = np.random.default_rng(0).integers(3, 50, size=(1, TOKENS))
    rows, labels = np.arange(TOKENS - 1), ids[:, 1:].reshape(-1)
    batch = Batch(ids, np.ones_like(ids), rows=rows, labels=labels, examples=np.arange(1))
    return _change(lambda: work.engine.use(parameters), lambda: work.engine.gradients(batch))


def _change(use: Callable[[], object], step: Callable[[], object]) -> Change:
    began = time.perf_counter()
    use()
    used = _ms(began)
    times = []
    for _ in range(1 + _STEPS):
        began = time.perf_counter()
        step()
        times.append(_ms(began))
    return Change(used, times[0], median(times[1:]))


def _ms(began: float) -> float:
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    found = measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
