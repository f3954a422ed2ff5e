"""A device on its home whose training is a constant, and a record of what it told its user."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from device_server import Aggregator
from device_standin import WEIGHT, make_frame

from edge_runtime.device import events
from edge_runtime.device.artifacts import Reply, Request, handle
from edge_runtime.device.eligibility import Conditions
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from edge_runtime.device.loop import RunOptions, Tools
from edge_runtime.device.records import Settings
from edge_runtime.device.running import run_device
from edge_runtime.training.job import Done, Event, Stepped, TrainingJob


class InProcessInspector:
    """The artifact checks without a process for each."""

    async def ask(self, request: Request) -> Reply:
        return handle(request)


@dataclass
class FakeTrainer:
    """Writes a frame of constant change; ``before`` runs first and may raise or wait."""

    weight: int = WEIGHT
    calls: list[int] = field(default_factory=list)
    steps: int = 1
    before: Callable[[TrainingJob], object] | None = None
    rng: np.random.Generator | None = None  # with one, nothing is constant

    async def train(self, job: TrainingJob, on_event: Callable[[Event], None]) -> Done:
        self.calls.append(int(Path(job.plan).stem.removeprefix("round-")))
        if self.before is not None:
            self.before(job)
        for step in range(1, self.steps + 1):
            on_event(Stepped(step, self.steps, 2.0))
        return make_frame(job, self.weight, rng=self.rng)


@dataclass
class Bench:
    """A home and what happened on it."""

    home: Home
    aggregator: Aggregator
    trainer: FakeTrainer = field(default_factory=FakeTrainer)
    seen: list[events.DeviceEvent] = field(default_factory=list)
    on_event: Callable[[events.DeviceEvent], None] | None = None
    slept: list[float] = field(default_factory=list)
    conditions: Callable[[], Conditions] = Conditions
    settings: Settings = field(default_factory=lambda: Settings(data=("data.jsonl",)))
    memory_mb: int | None = None
    tier: int = 0

    async def run(self, *, limit_s: float = 10, once: bool = False) -> None:
        """One process's life on this home, sleeps shortened."""

        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)
            await asyncio.sleep(min(seconds, 0.01))

        def report(event: events.DeviceEvent) -> None:
            self.seen.append(event)
            if self.on_event is not None:
                self.on_event(event)

        host = Host(rng=random.Random(5), sleep=sleep, conditions=self.conditions)
        tools = Tools(self.trainer, InProcessInspector(), host, report)
        options = RunOptions(self.settings, once=once, wait_s=1, memory_budget_mb=self.memory_mb, tier=self.tier)
        with self.home.locked():
            await asyncio.wait_for(run_device(self.home, tools, options), limit_s)

    def of(self, kind: type) -> list:
        return [event for event in self.seen if isinstance(event, kind)]

    def stop_at(self, kind: type, count: int = 1) -> None:
        """Cancel the run when the ``count``-th event of this kind is reported."""

        def check(event: events.DeviceEvent) -> None:
            if len(self.of(kind)) >= count:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()

        self.on_event = check
