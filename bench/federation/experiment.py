"""One run in a process of its own: ``python -m bench.federation.experiment SETUP.json``, its line on stdout."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench.federation.compute import training_flop
from bench.federation.course import Course, line_of
from bench.federation.drift import drift
from bench.federation.fleet import Result
from bench.federation.full_model import full_course
from bench.federation.lines import Line, RoundLine
from bench.federation.methods import FULL_MODEL
from bench.federation.site import Setup, Site, open_site
from cloud.planning import plan_layouts
from edge_runtime.bundle import Array
from edge_runtime.wire import Plan, carried_modules


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
    site = await open_site(setup, say)
    try:
        head = await measure_head(site)
        course = await (full_course if setup.key.method == FULL_MODEL else _adapter_course)(site)
    finally:
        await site.aggregator.close()
    return line_of(site, course, bytes_head=head, seconds=time.perf_counter() - began)


async def measure_head(site: Site) -> int:
    """Let every device send its class means, if the task wants them; bytes of plans and updates."""
    signed = await site.plan()
    if signed.plan.state != "measure":
        return 0
    results = [await site.fleet.take_part(name) for name in site.fleet.names]
    await site.aggregator.tick()
    return sum(result.up + result.down for result in results)


async def _adapter_course(site: Site) -> Course:
    """The rounds of a method of the aggregator's."""
    start = await site.measure(site.glimpse)
    curve = [await _round(site, round_) for round_ in range(site.setup.sizes.rounds)]
    last = curve[-1].value if site.glimpse is site.held_out else None
    return Course(start, curve, await site.measure(site.held_out) if last is None else last)


async def _round(site: Site, round_: int) -> RoundLine:
    sizes = site.setup.sizes
    cohort = site.cohort(round_)
    signed = await site.plan()
    layouts = plan_layouts(site.work.bundle, signed.plan)
    results: list[Result] = []
    values: list[Array] = []
    for name in cohort:
        results.append(await site.fleet.take_part(name))
        values.append(site.fleet.values(signed, layouts))
    await site.aggregator.tick()
    value = await site.measure(site.glimpse) if sizes.measured(round_) else None
    accuracy, loss = site.workload.metric.fields(value)
    modules = signed.plan.modules
    living = [module for module in modules if module.alive]
    made = RoundLine(
        accuracy=accuracy,
        bytes_up=sum(result.up for result in results),
        bytes_down=sum(result.down - result.head_down for result in results),
        params_up=sum(layouts[result.done.metrics.tier].held for result in results),
        params_down=sum(result.params_down for result in results),
        gflop=_gflop(site, signed.plan, results),
        drift=round(drift(values, [result.done.weight for result in results]), 4),
        alive=round(sum(len(module.alive) for module in modules) / (2 * len(modules)), 4),
        rank=round(sum(module.rank for module in living) / max(len(living), 1), 3),
        train_s=round(sum(result.done.metrics.seconds or 0.0 for result in results), 2),
        loss=loss,
    )
    site.fetched.update(cohort)
    site.head_down += sum(result.head_down for result in results)
    site.say(
        f"round {round_ + 1}/{sizes.rounds}: {site.workload.metric.name} {value or '–'}, {made.bytes_up:,} bytes up, "
        f"{made.bytes_down:,} down, drift {made.drift}"
    )
    return made


def _gflop(site: Site, plan: Plan, results: list[Result]) -> float:
    manifest = site.work.bundle.manifest
    flop = 0
    for result in results:
        carried = carried_modules(plan, result.done.metrics.tier, manifest.places)
        flop += training_flop(manifest, carried, site.texts(result.device).part(result.done.tokens), result.done.spared)
    return round(flop / 1e9, 1)


def main(path: str) -> None:
    """Run what the file says and print the line."""
    setup = msgspec.json.decode(Path(path).read_bytes(), type=Setup)
    line = asyncio.run(run(setup, lambda text: print(f"    {text}", file=sys.stderr, flush=True)))
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
