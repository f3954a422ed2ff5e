"""One run in which every device takes part in every round, and what a rule of outliers would say of its rounds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from bench.federation.experiment import measure_head
from bench.federation.site import Setup, Site, open_site
from bench.host import commit, describe_host
from bench.outliers.figures import Figures, Imprints, Rule, directions, norms
from cloud.aggregate import Imprint, Sketcher
from cloud.planning import plan_layouts

SKETCHES = 6  # of each round: where values go in one is drawn, and so is what it finds


class Asked(msgspec.Struct, frozen=True):
    """One run.

    Attributes:
        dataset: What is learned.
        alpha: Of the Dirichlet split.
        seed: Of split and task.
        method: A name of :mod:`bench.federation.methods`.
        budget: Its size, or "".
        rounds: Training rounds, in each of which all devices take part.
        examples: Of all devices together, before ``spread`` takes some away.
        spread: Sigma of the log-normal distribution of devices' amounts of data; 0: as the split makes them.
        steps: Of a device and round, whatever it has; None: once over its data.
    """

    dataset: str
    alpha: float
    seed: int
    method: str
    budget: str
    rounds: int
    examples: int
    spread: float
    steps: int | None


class Line(msgspec.Struct, frozen=True):
    """What was measured.

    Attributes:
        asked: The run.
        texts: Of a device: least, median, most.
        norm: Of an honest device over the round's median: least, median, most.
        cosine: Of an honest device with the mean direction of the others: least, median, most.
        turned: With two devices a draw turned around, by ``min_cosine``.
        enlarged: With two devices a draw that send a hundred times as much, by ``norm_factor``.
        seconds: That the run took.
        commit: The checkout's.
        host: Processor, cores, threads, versions.
    """

    asked: Asked
    texts: tuple[int, int, int]
    norm: tuple[float, float, float]
    cosine: tuple[float, float, float]
    turned: tuple[Rule, ...]
    enlarged: tuple[Rule, ...]
    seconds: float
    commit: str
    host: dict[str, object]


async def measure(asked: Asked, setup: Setup, *, draws: int, say: Callable[[str], None]) -> Line:
    """Run a task in which every device takes part in every round, and judge its rounds.

    Args:
        asked: What was asked for.
        setup: The run.
        draws: Of who is hostile, a round and sketch of it.
        say: Told a line a round.
    """
    began, rounds = time.perf_counter(), list[Imprints]()
    site = await open_site(setup, say)
    try:
        await measure_head(site)
        for number in range(asked.rounds):
            rounds += await _round(site)
            say(f"round {number + 1}/{asked.rounds}")
        texts = [len(site.data[name].examples) for name in site.fleet.names]
    finally:
        await site.aggregator.close()
    figures, rng = Figures(), np.random.default_rng(asked.seed)
    for imprints in rounds:
        figures.add(imprints)
    least, median, most = _spread(texts)
    return Line(
        asked=asked,
        texts=(int(least), int(median), int(most)),
        norm=_spread(figures.norms),
        cosine=_spread(figures.cosines),
        turned=directions(rounds, rng, draws),
        enlarged=norms(rounds, rng, draws),
        seconds=round(time.perf_counter() - began, 1),
        commit=commit(),
        host=dict(describe_host(setup.threads)),
    )


async def _round(site: Site) -> list[Imprints]:
    """Let all devices do the open round; what is kept of their updates, once a sketch."""
    signed = await site.plan()
    layouts = plan_layouts(site.work.bundle, signed.plan)
    sketchers = [Sketcher(layouts, secrets.token_bytes(32)) for _ in range(SKETCHES)]
    kept: list[dict[str, Imprint]] = [{} for _ in sketchers]
    for name in site.fleet.names:
        await site.fleet.take_part(name)
        update = site.fleet.update(signed, layouts)
        for imprints, sketcher in zip(kept, sketchers, strict=True):
            imprints[name] = sketcher.imprint(update)
    await site.aggregator.tick()
    return list(kept)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = (float(value) for value in np.quantile(values, (0.0, 0.5, 1.0)))
    return round(low, 3), round(middle, 3), round(high, 3)
