"""Our own engines as contestants. Nothing but the edge runtime is imported, so that the memory is a device's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.batches import LR, token_ids
from bench.clock import RuntimeClock
from bench.errors import UnavailableError
from bench.inside import Inside
from bench.systems import Setting, Setup
from edge_runtime.bundle import Array, Bundle, adapter_ranks, open_bundle
from edge_runtime.data import Batch
from edge_runtime.engine.adamw import AdamW
from edge_runtime.engine.interface import Engine
from edge_runtime.engine.model import BlockEngine
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.engine.remembered import RememberedHidden, memory_limit
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import ModulePlan, Training


def engine_options(setting: Setting, bundle: Bundle) -> dict[str, Any]:
    """The engine's options for a setting, see :mod:`edge_runtime.engine.budget`.

    A budget of exactly the weights' size leaves nothing for activations; with a smaller one the engine is tight.
    """
    options: dict[str, Any] = {"memory_budget_mb": None}
    if setting.activations == "recompute":
        options["memory_budget_mb"] = sum(array.nbytes for array in bundle.weights().values()) / (1 << 20)
    if setting.activations == "tight":
        options["memory_budget_mb"] = 0
    if setting.weights == "packed":
        options["packed"] = True
    if setting.products == "fast":
        options["products"] = "int8"
    return options


def bundle_engine(setup: Setup) -> Any:
    """The engine that the bundle is for; see :data:`bench.contestant.Made`.

    Raises:
        UnavailableError: nothing can be remembered here.
    """
    bundle = open_bundle(Path(setup.bundle), verify=False)
    work = WorkingBundle(bundle, threads=setup.threads, **engine_options(setup.setting, bundle))
    manifest = bundle.manifest
    adapter = work.adapter(Path(setup.adapter))
    ranks = adapter_ranks(manifest, adapter)
    plan = [ModulePlan(name, ranks[name], setup.factors[name]) for name in manifest.module_names]  # type: ignore[arg-type] # "AB", "A", "B" or ""
    parameters = AdapterParameters(adapter, work.layout(plan, head_alive=False))
    batch = _batch(setup)
    optimizer = AdamW(parameters, Training(setup.batch, setup.tokens, LR, LR, LR, steps=1))
    _use(work.engine, parameters, setup, batch)
    first: dict[str, Array] = {name: np.array(g) for name, g in work.engine.gradients(batch).tensors.items()}
    return _step(work.engine, optimizer, batch), first


def _use(engine: Engine, parameters: AdapterParameters, setup: Setup, batch: Batch) -> None:
    """Have the engine work on the parameters; what shall be remembered is on disk afterwards."""
    if setup.setting.lower == "computed":
        engine.use(parameters)
        return
    folder = Path(setup.gradients).parent  # of the results: on the disk that the user chose
    remembered = RememberedHidden(folder, max_bytes=memory_limit(folder, None))
    engine.use(parameters, remembered)
    engine.gradients(batch)
    if remembered.examples != setup.batch:
        reason = remembered.trouble or f"only {remembered.examples} of {setup.batch} examples fit"
        raise UnavailableError(f"{setup.system}: {setup.setting}: {reason}")


def _step(engine: Engine, optimizer: AdamW, batch: Batch) -> Any:
    """A step that tells of its inside where the engine is ours."""
    if not isinstance(engine, BlockEngine):

        def silent() -> None:
            optimizer.step(engine.gradients(batch).tensors)

        return silent

    def step() -> Inside:
        with RuntimeClock() as clock:
            tensors = engine.gradients(batch).tensors
        began = time.perf_counter()
        optimizer.step(tensors)
        optimizer_s = time.perf_counter() - began
        return Inside(1e3 * clock.seconds, 1e3 * optimizer_s, engine.kept_bytes / (1 << 20))

    return step


def _batch(setup: Setup) -> Batch:
    ids = token_ids(setup)
    rows = np.arange(ids.size).reshape(ids.shape)[:, :-1].reshape(-1)
    return Batch(ids, np.ones_like(ids), rows=rows, labels=ids[:, 1:].reshape(-1), examples=np.arange(setup.batch))
