"""One run in a process of its own: ``python -m bench.federation.experiment SETUP.json``, its line on stdout."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from bench.federation.compute import Texts, training_flop
from bench.federation.data import Labelled, divide, read_corpus, write_records
from bench.federation.drift import drift
from bench.federation.fleet import Fleet, Result
from bench.federation.full_model import FullModel
from bench.federation.lines import Key, Line, RoundLine
from bench.federation.methods import FULL_MODEL, METHODS, REMEMBERING, config_text
from bench.host import commit, describe_host
from cloud.config import CONFIG_NAME, Config, parse_config
from cloud.keys import KEYS_FOLDER, load_keys, make_keys
from cloud.planning import plan_layout
from cloud.service import Aggregator, Surroundings
from cloud.work import read_adapter
from edge_runtime import wire
from edge_runtime.bundle import Array, Bundle, open_bundle
from edge_runtime.data import Dataset
from edge_runtime.engine.interface import Score
from edge_runtime.training.local import evaluate
from edge_runtime.training.session import WorkingBundle

CURVE_TEXTS = 400  # test texts measured on the way; all of them at the end
CURVE_ROUNDS = 2  # measured after so many rounds each


class Setup(msgspec.Struct, frozen=True):
    """One run. Paths as text; ``folder`` is emptied by the caller; ``alpha`` of the key None: the data's own split."""

    key: Key
    data: str
    bundle: str
    folder: str
    devices: int
    cohort: int  # devices a round
    rounds: int
    examples: int  # of all devices together
    threads: int
    products: wire.Products
    model: str = "minilm"  # preset or folder that the bundle was made from, for methods that train all of it
    extra: dict[str, dict[str, object]] = {}  # config keys of a variant


@dataclass
class Site:
    """An aggregator, its devices, and what is measured on."""

    setup: Setup
    config: Config
    aggregator: Aggregator
    work: WorkingBundle
    fleet: Fleet
    data: dict[str, Dataset]  # of the devices
    texts: dict[str, Texts]  # sizes of it
    test: Dataset
    glimpse: Dataset  # the part of it that is measured after every round
    say: Callable[[str], None]
    fetched: set[str] = field(default_factory=set)  # devices that have taken part
    head_down: int = 0  # bytes of the head made before training, as devices fetched it


async def run(setup: Setup, say: Callable[[str], None]) -> Line:
    """Run a task from the first plan to the last adapter.

    Args:
        setup: What to run.
        say: Told a line a round.

    Raises:
        RequestError: the data cannot be used.
        FleetError: a device failed.
    """
    began = time.perf_counter()
    site = await _open(setup, say)
    try:
        head = await _measure_head(site)
        course = await (_whole_model if setup.key.method == FULL_MODEL else _adapter)(site)
    finally:
        await site.aggregator.close()
    return _line(site, course, head, time.perf_counter() - began)


@dataclass(frozen=True)
class _Course:
    """What the rounds made: accuracy before them on a part of the test texts, after them on all."""

    start: float
    curve: list[RoundLine]
    end: float


async def _adapter(site: Site) -> _Course:
    """The rounds of a method of the aggregator's."""
    start = await _accuracy(site, site.glimpse)
    curve = [await _round(site, round_) for round_ in range(site.setup.rounds)]
    return _Course(start, curve, await _accuracy(site, site.test))


async def _whole_model(site: Site) -> _Course:
    """The rounds of ``fedavg-full``, whose head is the one that was measured."""
    return await asyncio.to_thread(_full_rounds, site, await _tensors(site), (await _plan(site)).plan)


def _full_rounds(site: Site, adapter: dict[str, Array], plan: wire.Plan) -> _Course:
    setup, bundle = site.setup, site.work.bundle
    head = {name: adapter[name] for name in bundle.manifest.head_shapes}
    model = FullModel(bundle.manifest, head, setup.model, setup.threads)
    start, curve = model.accuracy(site.glimpse), list[RoundLine]()
    for round_ in range(setup.rounds):
        cohort = _cohort(site, round_)
        share = wire.rate_share(site.config.training.lr_schedule, round_ / max(setup.rounds - 1, 1))
        training = msgspec.structs.replace(plan.training, lr_b=site.config.training.lr_b * share)
        began = time.perf_counter()
        parts = [
            model.train(site.data[name], training, np.random.default_rng([setup.key.seed, round_])) for name in cohort
        ]
        model.average(parts)
        train_s = time.perf_counter() - began
        values = len(parts) * model.parameters
        made = RoundLine(
            accuracy=model.accuracy(site.glimpse) if _measured(setup, round_) else None,
            bytes_up=4 * values,
            bytes_down=4 * values,
            params_up=values,
            params_down=values,
            gflop=round(sum(model.flop(site.texts[name]) for name in cohort) / 1e9, 1),
            drift=None,
            alive=1.0,
            rank=0.0,
            train_s=round(train_s, 2),
        )
        site.fetched.update(cohort)
        site.say(f"round {round_ + 1}/{setup.rounds}: accuracy {made.accuracy or '–'}")
        curve.append(made)
    return _Course(start, curve, model.accuracy(site.test))


def _cohort(site: Site, round_: int) -> list[str]:
    """The devices of a training round, the same for every method."""
    rng = np.random.default_rng([site.setup.key.seed, 2, round_])
    return sorted(rng.choice(site.fleet.names, size=site.setup.cohort, replace=False))


def _measured(setup: Setup, round_: int) -> bool:
    """Whether accuracy is measured after a round."""
    return (round_ + 1) % CURVE_ROUNDS == 0 or round_ + 1 == setup.rounds


async def _open(setup: Setup, say: Callable[[str], None]) -> Site:
    key, folder = setup.key, Path(setup.folder)
    corpus = read_corpus(key.dataset, Path(setup.data))
    parts = divide(corpus, devices=setup.devices, examples=setup.examples, alpha=key.alpha, seed=key.seed)
    files = tuple(write_records(folder / "texts" / f"{number}.jsonl", part) for number, part in enumerate(parts))
    test = _shuffled(corpus.test)
    config = _config(setup, folder)
    bundle = open_bundle(config.bundle_path, verify=False)
    work = WorkingBundle(bundle, threads=setup.threads, products=setup.products)
    max_tokens = config.training.max_tokens
    data = [work.dataset([path], max_tokens=max_tokens, skip_bad=False) for path in files]
    written = [write_records(folder / "texts" / name, texts) for name, texts in _sides(test).items()]
    whole, glimpse = (work.dataset([path], max_tokens=max_tokens, skip_bad=False) for path in written)
    aggregator = Aggregator(
        config,
        bundle,
        keys=load_keys(config.data_path / KEYS_FOLDER),
        folder=config.data_path,
        surroundings=Surroundings(time.time, secrets.token_bytes, lambda _event: None),
    )
    await aggregator.start()
    remember_mb = 0 if key.without == REMEMBERING else None
    fleet = Fleet(aggregator, work, folder / "devices", files, seed=key.seed, remember_mb=remember_mb)
    await fleet.enrol()
    named = dict(zip(fleet.names, data, strict=True))
    texts = {name: Texts.of([len(example.ids) for example in mine.examples]) for name, mine in named.items()}
    return Site(setup, config, aggregator, work, fleet, named, texts, whole, glimpse, say)


def _shuffled(texts: tuple[Labelled, ...]) -> list[Labelled]:
    """In an order that is the same in every run, so that the first of them are of all labels."""
    return [texts[index] for index in np.random.default_rng(0).permutation(len(texts))]


def _sides(test: list[Labelled]) -> dict[str, list[Labelled]]:
    return {"test.jsonl": test, "glimpse.jsonl": test[:CURVE_TEXTS]}


def _config(setup: Setup, folder: Path) -> Config:
    fleet = {
        "rounds": setup.rounds,
        "devices_per_round": setup.cohort,
        "min_devices": setup.cohort,
        "head_init_devices": setup.devices,
        "round_deadline_s": 86_400.0,
        "weight_cap": 65_536,
    }
    text = config_text(
        METHODS[setup.key.method],
        setup.key.budget,
        bundle=str(Path(setup.bundle).resolve()),
        seed=setup.key.seed,
        fleet=fleet,
        extra=setup.extra,
    )
    path = folder / CONFIG_NAME
    path.write_text(text, encoding="utf-8")
    config = parse_config(text.encode(), path=path)
    config.data_path.mkdir(mode=0o700)
    make_keys(config.data_path / KEYS_FOLDER)
    return config


async def _measure_head(site: Site) -> int:
    """Let every device send its class means, if the task wants them; bytes of plans and updates."""
    signed = await _plan(site)
    if signed.plan.state != "measure":
        return 0
    results = [await site.fleet.take_part(name) for name in site.fleet.names]
    await site.aggregator.tick()
    return sum(result.up + result.down for result in results)


async def _round(site: Site, round_: int) -> RoundLine:
    setup = site.setup
    cohort = _cohort(site, round_)
    signed = await _plan(site)
    layout = plan_layout(site.work.bundle, signed.plan)
    results: list[Result] = []
    values = []
    for name in cohort:
        results.append(await site.fleet.take_part(name))
        values.append(site.fleet.values(signed, layout))
    await site.aggregator.tick()
    accuracy = await _accuracy(site, site.glimpse) if _measured(setup, round_) else None
    manifest, modules = site.work.bundle.manifest, signed.plan.modules
    flop = sum(
        training_flop(manifest, modules, site.texts[name], result.done.spared)
        for name, result in zip(cohort, results, strict=True)
    )
    living = [module for module in modules if module.alive]
    made = RoundLine(
        accuracy=accuracy,
        bytes_up=sum(result.up for result in results),
        bytes_down=sum(result.down - result.head_down for result in results),
        params_up=layout.count * len(results),
        params_down=sum(result.params_down for result in results),
        gflop=round(flop / 1e9, 1),
        drift=round(drift(values, [result.done.weight for result in results]), 4),
        alive=round(sum(len(module.alive) for module in modules) / (2 * len(modules)), 4),
        rank=round(sum(module.rank for module in living) / max(len(living), 1), 3),
        train_s=round(sum(result.done.metrics.seconds or 0.0 for result in results), 2),
    )
    site.fetched.update(cohort)
    site.head_down += sum(result.head_down for result in results)
    site.say(
        f"round {round_ + 1}/{setup.rounds}: accuracy {accuracy or '–'}, {made.bytes_up:,} bytes up, "
        f"{made.bytes_down:,} down, drift {made.drift}"
    )
    return made


async def _plan(site: Site) -> wire.SignedPlan:
    """The plan in force."""
    signed = await site.aggregator.plan_after(site.fleet.names[0], task=site.config.task.name, after=-1, wait_s=0)
    assert signed is not None, "a started aggregator has a plan"
    return signed


async def _accuracy(site: Site, texts: Dataset) -> float:
    """Of the adapter in force."""
    score = await asyncio.to_thread(_score, site.work, await _tensors(site), texts)
    return score.correct / score.rows


async def _tensors(site: Site) -> dict[str, Array]:
    """The adapter in force."""
    signed = await _plan(site)
    return read_adapter(site.work.bundle, site.aggregator.blob_path(signed.plan.adapter).read_bytes())


def _score(work: WorkingBundle, adapter: dict[str, Array], texts: Dataset) -> Score:
    work.engine.use(work.none_alive(adapter))
    return evaluate(work.engine, texts, batch_size=64)


def _line(site: Site, course: _Course, head: int, seconds: float) -> Line:
    setup, key, curve = site.setup, site.setup.key, course.curve
    best = max(made.accuracy or 0.0 for made in curve)
    drifts = [made.drift for made in curve if made.drift is not None]
    return Line(
        dataset=key.dataset,
        alpha=key.alpha,
        seed=key.seed,
        method=key.method,
        budget=key.budget,
        without=key.without,
        accuracy=course.end,
        bytes_up=sum(made.bytes_up for made in curve),
        bytes_down=sum(made.bytes_down for made in curve),
        params_up=sum(made.params_up for made in curve),
        params_down=sum(made.params_down for made in curve),
        bytes_head=head + site.head_down,
        bytes_first_download=len(site.fetched) * _bundle_bytes(site.work.bundle),
        device_gflop=round(sum(made.gflop for made in curve), 1),
        rounds=setup.rounds,
        rounds_to_95=next(n for n, made in enumerate(curve, start=1) if (made.accuracy or 0.0) >= 0.95 * best),
        accuracy_start=course.start,
        drift=round(float(np.mean(drifts)), 4) if drifts else None,
        devices=setup.devices,
        seconds=round(seconds, 1),
        quick=key.quick,
        commit=commit(),
        curve=tuple(curve),
        host=dict(describe_host(setup.threads)),
    )


def _bundle_bytes(bundle: Bundle) -> int:
    return sum(entry.bytes for entry in bundle.manifest.files.values())


def main(path: str) -> None:
    """Run what the file says and print the line."""
    setup = msgspec.json.decode(Path(path).read_bytes(), type=Setup)
    line = asyncio.run(run(setup, lambda text: print(f"    {text}", file=sys.stderr, flush=True)))
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
