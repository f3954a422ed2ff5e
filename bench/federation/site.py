"""Where a run happens: an aggregator, its devices with their data, and what is held out."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from bench.federation.compute import Texts
from bench.federation.fleet import DeviceChoices, Fleet
from bench.federation.lines import Key
from bench.federation.methods import METHODS, config_text, merged
from bench.federation.shares import Shares, Sizes, write_records
from bench.federation.workloads import WORKLOADS, Workload
from bench.host import commit
from cloud.config import CONFIG_NAME, Config, parse_config
from cloud.keys import KEYS_FOLDER, load_keys, make_keys
from cloud.service import Aggregator, Surroundings
from cloud.work import read_adapter
from edge_runtime import wire
from edge_runtime.bundle import Array, open_bundle
from edge_runtime.data import Dataset
from edge_runtime.training.local import evaluate
from edge_runtime.training.session import WorkingBundle


class Setup(msgspec.Struct, frozen=True):
    """One run. Paths as text; ``folder`` is emptied by the caller; ``alpha`` of the key None: the data's own split."""

    key: Key
    data: str
    bundle: str
    folder: str
    sizes: Sizes
    threads: int
    products: wire.Products
    model: str | None = None  # preset or folder that the bundle was made from; None: the workload's preset
    extra: dict[str, dict[str, object]] = {}  # config keys of a variant
    tiers: tuple[int, ...] = (0,)  # that the devices take, in turn
    remember: bool = True  # what frozen blocks make of examples

    @property
    def workload(self) -> Workload:
        """What is learned."""
        return WORKLOADS[self.key.dataset]


@dataclass
class Site:
    """An aggregator, its devices, and what is measured on."""

    setup: Setup
    config: Config
    aggregator: Aggregator
    work: WorkingBundle
    fleet: Fleet
    data: dict[str, Dataset]  # of the devices
    held_out: Dataset
    glimpse: Dataset  # the part of it that is measured on the way; the same object where that is all of it
    say: Callable[[str], None]
    commit: str  # of the code that runs: the checkout may be another one when the run ends
    fetched: set[str] = field(default_factory=set)  # devices that have taken part
    head_down: int = 0  # bytes of the head made before training, as devices fetched it

    @property
    def workload(self) -> Workload:
        """What is learned."""
        return self.setup.workload

    def cohort(self, round_: int) -> list[str]:
        """The devices of a training round, the same for every method."""
        rng = np.random.default_rng([self.setup.key.seed, 2, round_])
        chosen = rng.choice(self.fleet.names, size=self.setup.sizes.cohort, replace=False)
        return sorted(map(str, chosen))  # numpy has strings of its own, which JSON has not

    def texts(self, name: str) -> Texts:
        """Sizes of a device's data."""
        return Texts.of(self.data[name].examples)

    async def plan(self) -> wire.SignedPlan:
        """The plan in force."""
        signed = await self.aggregator.plan_after(self.fleet.names[0], task=self.config.task.name, after=-1, wait_s=0)
        assert signed is not None, "a started aggregator has a plan"
        return signed

    async def adapter(self) -> dict[str, Array]:
        """The adapter in force."""
        signed = await self.plan()
        return read_adapter(self.work.bundle, self.aggregator.blob_path(signed.plan.adapter).read_bytes())

    async def measure(self, texts: Dataset) -> float:
        """The workload's metric of the adapter in force."""
        self.work.engine.use(self.work.none_alive(await self.adapter()))
        score = await asyncio.to_thread(evaluate, self.work.engine, texts, batch_size=64)
        return self.workload.metric.of(score)


async def open_site(setup: Setup, say: Callable[[str], None]) -> Site:
    """Divide the data, start the aggregator and enrol the devices.

    Args:
        setup: What to run.
        say: Told a line a round.

    Raises:
        RequestError: the data cannot be used.
    """
    key, folder, version = setup.key, Path(setup.folder), commit()
    shares = setup.workload.share(Path(setup.data), setup.sizes, key.alpha, key.seed)
    files = tuple(write_records(folder / "texts" / f"{n}.jsonl", part) for n, part in enumerate(shares.devices))
    config = _config(setup, folder)
    bundle = open_bundle(config.bundle_path, verify=False)
    work = WorkingBundle(bundle, threads=setup.threads, products=setup.products)
    data = [_dataset(work, config, path) for path in files]
    held_out, glimpse = _held_out(work, config, shares, setup.sizes.glimpse)
    aggregator = Aggregator(
        config,
        bundle,
        keys=load_keys(config.data_path / KEYS_FOLDER),
        folder=config.data_path,
        surroundings=Surroundings(time.time, secrets.token_bytes, lambda _event: None),
    )
    await aggregator.start()
    choices = DeviceChoices(setup.tiers, remember_mb=None if setup.remember else 0)
    fleet = Fleet(aggregator, work, folder / "devices", files, seed=key.seed, choices=choices)
    await fleet.enrol()
    named = dict(zip(fleet.names, data, strict=True))
    return Site(setup, config, aggregator, work, fleet, named, held_out, glimpse, say, version)


def _dataset(work: WorkingBundle, config: Config, path: Path) -> Dataset:
    return work.dataset([path], max_tokens=config.training.max_tokens, skip_bad=False)


def _held_out(work: WorkingBundle, config: Config, shares: Shares, glimpse: int) -> tuple[Dataset, Dataset]:
    """All of it, and the part that is measured on the way."""
    folder = Path(config.folder) / "texts"
    whole = _dataset(work, config, write_records(folder / "test.jsonl", shares.held_out))
    if len(shares.held_out) <= glimpse:
        return whole, whole
    return whole, _dataset(work, config, write_records(folder / "glimpse.jsonl", shares.held_out[:glimpse]))


def _config(setup: Setup, folder: Path) -> Config:
    sizes = setup.sizes
    workload, method, budget = setup.workload, setup.key.method, setup.key.budget
    fleet = {
        "rounds": sizes.rounds,
        "devices_per_round": sizes.cohort,
        "min_devices": sizes.cohort,
        "round_deadline_s": 86_400.0,
        "weight_cap": 65_536,
    }
    text = config_text(
        METHODS[method],
        budget,
        bundle=str(Path(setup.bundle).resolve()),
        seed=setup.key.seed,
        shared=merged(workload.tables(sizes), {"task": fleet}),
        reference_bytes=workload.reference_bytes,
        extra=merged({"training": workload.rates.get((method, budget), {})}, setup.extra),
    )
    path = folder / CONFIG_NAME
    path.write_text(text, encoding="utf-8")
    config = parse_config(text.encode(), path=path)
    config.data_path.mkdir(mode=0o700)
    make_keys(config.data_path / KEYS_FOLDER)
    return config
