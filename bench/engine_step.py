"""Our own engines as contestants. Nothing but the edge runtime is imported, so that the memory is a device's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bench.batches import LR, token_ids
from bench.errors import UnavailableError
from bench.systems import Setting, Setup
from edge_runtime.bundle import Array, adapter_ranks, open_bundle
from edge_runtime.data import Batch
from edge_runtime.engine.adamw import AdamW
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import ModulePlan, Training


def engine_options(setting: Setting) -> dict[str, Any]:
    """The engine's options for a setting: None keeps every block's activations, 0 MiB keeps none."""
    options: dict[str, Any] = {"memory_budget_mb": None if setting.activations == "keep" else 0}
    if setting.weights == "packed":
        options["packed"] = True
    if setting.products == "fast":
        options["products"] = "int8"
    return options


def bundle_engine(setup: Setup) -> Any:
    """The engine that the bundle is for; see :data:`bench.contestant.Made`.

    Raises:
        UnavailableError: the engine has no such setting.
    """
    bundle = open_bundle(Path(setup.bundle), verify=False)
    try:
        work = WorkingBundle(bundle, threads=setup.threads, **engine_options(setup.setting))
    except TypeError as error:  # an option that this checkout's engine does not have
        raise UnavailableError(f"{setup.system}: {setup.setting}: the engine has no such option yet") from error
    manifest = bundle.manifest
    adapter = work.adapter(Path(setup.adapter))
    ranks = adapter_ranks(manifest, adapter)
    plan = [ModulePlan(name, ranks[name], setup.factors[name]) for name in manifest.module_names]  # type: ignore[arg-type] # "AB", "A", "B" or ""
    parameters = AdapterParameters(adapter, work.layout(plan, head_alive=False))
    batch = _batch(setup)
    optimizer = AdamW(parameters, Training(setup.batch, setup.tokens, LR, LR, LR, steps=1))
    work.engine.use(parameters)
    first: dict[str, Array] = {name: np.array(g) for name, g in work.engine.gradients(batch).tensors.items()}

    def step() -> None:
        optimizer.step(work.engine.gradients(batch).tensors)

    return step, first


def _batch(setup: Setup) -> Batch:
    ids = token_ids(setup)
    rows = np.arange(ids.size).reshape(ids.shape)[:, :-1].reshape(-1)
    return Batch(ids, np.ones_like(ids), rows=rows, labels=ids[:, 1:].reshape(-1), examples=np.arange(setup.batch))
