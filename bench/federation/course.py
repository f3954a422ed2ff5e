"""What the rounds of a run made, and the line of results that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.federation.lines import Line, RoundLine
from bench.federation.site import Site
from bench.host import describe_host
from edge_runtime.bundle import Bundle


@dataclass(frozen=True)
class Course:
    """Values of the workload's metric: before the rounds on a part of what is held out, after them on all of it."""

    start: float
    curve: list[RoundLine]
    end: float


def line_of(site: Site, course: Course, *, bytes_head: int, seconds: float) -> Line:
    """The line of a run.

    Args:
        site: Where it was.
        course: What it made.
        bytes_head: Of plans and updates before the first training round, both ways.
        seconds: That all of it took.
    """
    setup, key, curve = site.setup, site.setup.key, course.curve
    metric = site.workload.metric
    values = [made.value for made in curve]
    drifts = [made.drift for made in curve if made.drift is not None]
    accuracy, loss = metric.fields(course.end)
    accuracy_start, loss_start = metric.fields(course.start)
    return Line(
        dataset=key.dataset,
        alpha=key.alpha,
        seed=key.seed,
        method=key.method,
        budget=key.budget,
        without=key.without,
        accuracy=accuracy,
        bytes_up=sum(made.bytes_up for made in curve),
        bytes_down=sum(made.bytes_down for made in curve),
        params_up=sum(made.params_up for made in curve),
        params_down=sum(made.params_down for made in curve),
        bytes_head=bytes_head + site.head_down,
        bytes_first_download=len(site.fetched) * _bundle_bytes(site.work.bundle),
        device_gflop=round(sum(made.gflop for made in curve), 1),
        rounds=setup.sizes.rounds,
        rounds_to_95=metric.rounds_until(metric.nearly(course.start, values), values),
        accuracy_start=accuracy_start,
        drift=round(float(np.mean(drifts)), 4) if drifts else None,
        devices=setup.sizes.devices,
        seconds=round(seconds, 1),
        quick=key.quick,
        commit=site.commit,
        curve=tuple(curve),
        host=dict(describe_host(setup.threads)),
        loss=loss,
        loss_start=loss_start,
        settings=setup.extra,
    )


def _bundle_bytes(bundle: Bundle) -> int:
    return sum(entry.bytes for entry in bundle.manifest.files.values())
