"""What training and evaluation share: a bundle opened for work, with encoder, engine and adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edge_runtime.bundle import Array, Bundle, adapter_ranks, map_tensors, read_peft_folder
from edge_runtime.data import Dataset, Purpose, TextEncoder, load_dataset
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.interface import Engine
from edge_runtime.engine.model import BlockEngine
from edge_runtime.engine.ort_training.bindings import load_bindings
from edge_runtime.engine.ort_training.model import OrtTrainingEngine
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.engine.runtime import check_runtime, start_runtime
from edge_runtime.training.accumulate import default_micro_tokens
from edge_runtime.wire import Layout, ModulePlan, Plan, Products, carried_modules, layout_of, tier_layouts


class WorkingBundle:
    """An opened bundle and what is needed to work with it. The engine is made when first used."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        memory_budget_mb: float | None = None,
        products: Products = "exact",
        packed: bool = False,
    ) -> None:
        """``threads`` None means one a core; for the others see :class:`edge_runtime.engine.model.BlockEngine`.

        The engine ``ort-training`` keeps all activations, whatever the budget, and has exact products only.

        Raises:
            EngineMissingError: this environment has not the ONNX Runtime that the bundle is for.
            EngineInputError: the bundle's engine has not these products.
        """
        self.bundle = bundle
        self._threads = threads
        self._memory_budget_mb = memory_budget_mb
        self._products = products
        self._packed = packed
        self._engine: Engine | None = None
        if bundle.manifest.engine == "blocks":
            check_runtime()
            return
        load_bindings()
        if products != "exact":
            raise EngineInputError(f"{products} products: the engine ort-training has none: use a bundle of blocks")

    @property
    def engine(self) -> Engine:
        """The engine that the bundle's manifest names."""
        if self._engine is None:
            self._engine = self._make_engine()
        return self._engine

    def _make_engine(self) -> Engine:
        if self.bundle.manifest.engine == "ort-training":
            return OrtTrainingEngine(self.bundle, threads=self._threads)
        start_runtime(self._threads)
        return BlockEngine(
            self.bundle,
            memory_budget_mb=self._memory_budget_mb,
            products=self._products,
            packed=self._packed,
        )

    def micro_tokens(self, asked: int | None) -> int:
        """Tokens that go through the model at once: what the user asked for, or what suits model and budget."""
        return asked or default_micro_tokens(self.bundle.manifest, self._memory_budget_mb)

    def encoder(self, max_tokens: int | None = None) -> TextEncoder:
        """The bundle's encoder; ``max_tokens`` None means the bundle's own limit."""
        manifest = self.bundle.manifest
        return TextEncoder(
            self.bundle.path("tokenizer.json"),
            manifest.text,
            task=manifest.task,
            labels=manifest.labels,
            max_tokens=max_tokens,
        )

    def dataset(
        self, files: Sequence[Path], *, max_tokens: int | None, skip_bad: bool, purpose: Purpose = "train"
    ) -> Dataset:
        """Read and tokenise local files."""
        return load_dataset(files, self.encoder(max_tokens), skip_bad=skip_bad, purpose=purpose)

    def layout(self, modules: Sequence[ModulePlan], *, head_alive: bool) -> Layout:
        """The alive blocks a plan asks for."""
        manifest = self.bundle.manifest
        return layout_of(modules, manifest.features, manifest.head_shapes if head_alive else {})

    def plan_layout(self, plan: Plan, tier: int = 0) -> Layout:
        """The layout of updates to a plan by devices of one of its tiers.

        Raises:
            PlanFormatError: the plan names a module that the bundle does not have, or not one range for every block.
        """
        manifest = self.bundle.manifest
        found = tier_layouts(plan, features=manifest.features, places=manifest.places, head=manifest.head_shapes)
        return found[tier]

    def trained_layout(self, plan: Plan, tier: int = 0) -> Layout:
        """The layout of what a device of a tier trains for a plan: what its update holds, and what it keeps instead.

        Raises:
            PlanFormatError: see :meth:`plan_layout`.
        """
        parts = plan.personal_parts
        if not parts:
            return self.plan_layout(plan, tier)
        modules = [
            msgspec.structs.replace(module, alive="AB") if "B" in parts and module.alive else module
            for module in carried_modules(plan, tier, self.bundle.manifest.places)
        ]
        return self.layout(modules, head_alive=plan.head_alive or "head" in parts)

    def all_alive(self, adapter: Mapping[str, Array]) -> AdapterParameters:
        """Parameters with both factors of every module and the head alive, at the adapter's own ranks."""
        ranks = adapter_ranks(self.bundle.manifest, adapter)
        modules = [ModulePlan(name, ranks[name], "AB") for name in self.bundle.manifest.module_names]
        return AdapterParameters(adapter, self.layout(modules, head_alive=True))

    def none_alive(self, adapter: Mapping[str, Array]) -> AdapterParameters:
        """Parameters for evaluation: nothing is alive."""
        return AdapterParameters(adapter, Layout(()))

    def adapter(self, path: Path | None) -> dict[str, Array]:
        """An adapter from a peft folder or one of our files; None: the bundle's initial one."""
        if path is None:
            return self.bundle.initial_adapter()
        if path.is_dir():
            return read_peft_folder(path, self.bundle.manifest)
        return map_tensors(path)
