"""The cases: what is sent, how much of it, and the line that says how it went.

A round's updates are sealed before its clock starts, and the plan that follows is waited for after it has stopped: the
time is that of uploads, from the first byte to the receipt, which a device gets when its update is verified, on the
disk and in the sum.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from bench.host import commit, describe_host
from bench.load.bundle import make_bundle
from bench.load.devices import Connection, Crowd, Parcel
from bench.load.server import Served, Task, serving

Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """So many updates of so many bytes (float32 values alone), in rounds, over so many connections at once.

    ``strangers`` connect beside every other round: so many that say nothing, and as many that begin a request and stop.
    """

    about: str
    update_bytes: int
    task: Task
    quick: Task
    connections: int
    strangers: int = 0


CASES = {
    "1mb": Case("updates of 1 MB", 1 << 20, Task(10, 1000), Task(2, 250), connections=16),
    "64kb": Case("updates of 64 kB", 1 << 16, Task(10, 1000), Task(2, 1000), connections=64),
    "strangers": Case(
        "updates of 64 kB beside 500 idle and 500 half-open connections",
        1 << 16,
        Task(12, 1000),
        Task(4, 500),
        connections=4,
        strangers=500,
    ),
}


class Line(msgspec.Struct, frozen=True):
    """One case.

    Attributes:
        mb_s: Sealed megabytes (10⁶ bytes) a second of upload time.
        updates_s: Updates a second of upload time.
        p50_ms: Of an upload, from its first byte to its receipt.
        p99_ms: The 99th percentile.
        p99_ratio: Of the rounds beside strangers to the others, each the median over rounds; None without strangers.
        rss_start_mb: Private memory of the aggregator when a tenth was sent, in MiB.
        rss_end_mb: When all was.
        rss_growth: The quotient.
        mb_s_core: Megabytes a second of processor time, all of the aggregator's threads.
        updates: So many.
        connections: At once.
        between_s: Median seconds from a round's last receipt to the next plan.
        rss_mb: The same memory at every tenth of the way.
    """

    case: str
    mb_s: float
    updates_s: float
    p50_ms: float
    p99_ms: float
    p99_ratio: float | None
    rss_start_mb: float
    rss_end_mb: float
    rss_growth: float
    mb_s_core: float
    updates: int
    update_bytes: int
    connections: int
    between_s: float
    rss_mb: tuple[float, ...]
    quick: bool
    commit: str
    host: dict[str, str | int | None]
    when: str


@dataclass
class Taken:
    """What was measured so far."""

    upload_s: float = 0.0
    cpu_s: float = 0.0
    between_s: list[float] = field(default_factory=list)
    rounds: list[list[float]] = field(default_factory=list)  # seconds of every upload
    memory_mb: list[float] = field(default_factory=list)

    @property
    def uploads(self) -> list[float]:
        """Seconds of every upload of all rounds."""
        return [seconds for round_ in self.rounds for seconds in round_]


async def run_case(name: str, folder: Path, *, quick: bool, say: Say) -> Line:
    """Run a case on an aggregator of its own, under an empty folder.

    Raises:
        UnavailableError: the aggregator did not listen, or refused an update.
    """
    case = CASES[name]
    task = case.quick if quick else case.task
    bundle = make_bundle(folder / "bundle", update_bytes=case.update_bytes)
    with serving(folder, bundle, task) as served:
        say(f"{name}: {task.rounds * task.devices:,} {case.about}; enrolling {task.devices} devices")
        crowd = await Crowd.enrol(served, bundle, task.devices)
        taken, size = Taken(), 0
        signed = await crowd.plan(after=-1)
        for round_ in range(task.rounds):
            parcels = crowd.parcels(signed)
            size = len(parcels[0].sealed)
            async with strangers(served.url, case.strangers if round_ % 2 else 0):
                await _send(crowd, parcels, served, case, taken)
            began = time.perf_counter()
            signed = await crowd.plan(after=round_)
            taken.between_s.append(time.perf_counter() - began)
            rate = len(taken.uploads) / taken.upload_s
            say(f"{name}: round {round_ + 1}/{task.rounds}: {rate:.0f} updates/s, {taken.memory_mb[-1]:.0f} MiB")
    return _line(name, case, taken, size, quick=quick)


async def _send(crowd: Crowd, parcels: Sequence[Parcel], served: Served, case: Case, taken: Taken) -> None:
    tenth = max(1, len(parcels) // 10)

    def watch(sent: int) -> None:
        if sent % tenth == 0:
            taken.memory_mb.append(served.private_mb())

    cpu, began = served.cpu_s(), time.perf_counter()
    taken.rounds.append(await crowd.send(parcels, connections=case.connections, on_sent=watch))
    taken.upload_s += time.perf_counter() - began
    taken.cpu_s += served.cpu_s() - cpu


@asynccontextmanager
async def strangers(url: str, count: int) -> AsyncIterator[None]:
    """So many connections that say nothing and as many that begin a request, until the block ends."""
    async with AsyncExitStack() as stack:
        for number in range(2 * count):
            connection = await Connection.open(url)
            stack.callback(connection.close)
            if number % 2:
                connection.writer.write(b"PUT /v1/tasks/load/rounds/0/updates/x HTTP/1.1\r\nHost: lo")
        await asyncio.sleep(0.2 if count else 0)
        yield


def _line(name: str, case: Case, taken: Taken, size: int, *, quick: bool) -> Line:
    uploads, memory = taken.uploads, taken.memory_mb
    start, end = memory[len(memory) // 10], memory[-1]
    millions = len(uploads) * size / 1e6
    return Line(
        case=name,
        mb_s=round(millions / taken.upload_s, 1),
        updates_s=round(len(uploads) / taken.upload_s, 1),
        p50_ms=_milliseconds(uploads, 50),
        p99_ms=_milliseconds(uploads, 99),
        p99_ratio=_ratio(taken.rounds) if case.strangers else None,
        rss_start_mb=round(start, 1),
        rss_end_mb=round(end, 1),
        rss_growth=round(end / start, 3),
        mb_s_core=round(millions / taken.cpu_s, 1),
        updates=len(uploads),
        update_bytes=size,
        connections=case.connections,
        between_s=round(float(np.median(taken.between_s)), 2),
        rss_mb=tuple(round(value, 1) for value in memory[:: max(1, len(memory) // 10)]),
        quick=quick,
        commit=commit(),
        host=describe_host(1),
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _ratio(rounds: Sequence[Sequence[float]]) -> float:
    """Median 99th percentile of every other round to that of the rest."""
    calm, beside = (float(np.median([_milliseconds(times, 99) for times in rounds[n::2]])) for n in (0, 1))
    return round(beside / calm, 2)


def _milliseconds(seconds: Sequence[float], percentile: float) -> float:
    return round(1000 * float(np.percentile(seconds, percentile)), 2)
