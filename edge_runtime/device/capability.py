"""What this device measures of itself and tells its aggregator: at enrolment, and when a figure has changed.

Telling is a courtesy: whatever goes wrong with it, the device takes part all the same, and tells the next time it has
something to tell.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import UNSET

from edge_runtime.device.client import Client
from edge_runtime.device.errors import RefusedError, TransportError
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from edge_runtime.device.records import Measured
from edge_runtime.device.transport import Traffic, Transport
from edge_runtime.wire import Capability, WireError

_MEMINFO = Path("/proc/meminfo")
_NEWS = 1.25  # a figure this many times larger or smaller than the one told is told again


def machine(calibration_s: float | None = None, *, meminfo: Path = _MEMINFO) -> Capability:
    """What the system says of this machine now, and the seconds of its calibration pass."""
    total_mb = (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) >> 20
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on macOS
    return Capability(
        machine=re.sub(r"[^A-Za-z0-9_.-]", "", platform.machine())[:32] or "unknown",
        cores=cores or 1,
        memory_mb=total_mb,
        available_mb=min(total_mb, _available_mb(meminfo, total_mb)),
        calibration_s=calibration_s or UNSET,
    )


def _available_mb(meminfo: Path, total_mb: int) -> int:
    """Free memory; where the system does not tell, a quarter of all, as the engine's default budget takes it."""
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) >> 10
    return total_mb // 4


def is_news(told: Capability, now: Capability) -> bool:
    """Whether an aggregator that was told the one would plan otherwise for the other."""
    for name in Capability.__struct_fields__:
        old, new = getattr(told, name), getattr(now, name)
        if not isinstance(old, (int, float)) or not isinstance(new, (int, float)):
            if old != new:
                return True
        elif max(old, new) > _NEWS * min(old, new):
            return True
    return False


async def tell_first(home: Home, calibration_s: float | None, *, host: Host) -> None:
    """Measure this machine, keep that in the home of a device that has just enrolled, and tell it."""
    home.save_measured(Measured(machine(calibration_s)))
    identity = home.identity()
    async with Client.of(identity, host) as client:
        await SelfReport(home, client, identity.task, host.clock).tell()


class SelfReport:
    """What is known of this device, kept in its home from one run to the next.

    Args:
        home: Of an enrolled device; the caller holds its lock.
        client: Its connection, whose traffic has been timed.
        task: Whose aggregator is told.
        clock: Unix seconds.
    """

    def __init__(self, home: Home, client: Transport, task: str, clock: Callable[[], float]) -> None:
        self._home, self._client, self._task, self._clock = home, client, task, clock
        stored = home.measured()
        self._told = stored.capability if stored is not None and stored.told else None
        # Free memory as it is now, while nothing is trained; the rest as it was measured last.
        self._now = _merged(None if stored is None else stored.capability, machine())
        self._last_step: float | None = None
        self._steps: list[float] = []

    @property
    def now(self) -> Capability:
        """The newest figures."""
        return self._now

    def stepped(self, step: int) -> None:
        """An optimizer step of a round that carries the whole plan has ended; ``step`` counts from 1.

        Steps of a weaker tier are not told of: they are faster, and would send the device back to what was too slow.
        """
        now = self._clock()
        if step == 1:
            self._steps = []
        elif self._last_step is not None:
            self._steps.append(now - self._last_step)
        self._last_step = now

    def interrupted(self) -> None:
        """The time to the next step says nothing of steps."""
        self._last_step = None

    async def tell(self) -> None:
        """Tell the aggregator if there is news."""
        self._now = _with_links(self._now, self._client.traffic)
        if self._steps and statistics.median(self._steps) > 0:
            self._now = msgspec.structs.replace(self._now, step_s=statistics.median(self._steps))
        if self._told is not None and not is_news(self._told, self._now):
            return
        # An aggregator from before this resource knows no such path. Whatever else it is, the next poll says it.
        with contextlib.suppress(WireError, TransportError, RefusedError):
            await self._client.tell(self._task, self._now)
            self._told = self._now
        self._home.save_measured(Measured(self._now, told=self._told == self._now))


def _merged(stored: Capability | None, now: Capability) -> Capability:
    if stored is None:
        return now
    kept = ("calibration_s", "step_s", "up_bytes_s", "down_bytes_s", "round_trip_s")
    return msgspec.structs.replace(now, **{name: getattr(stored, name) for name in kept})


def _with_links(capability: Capability, traffic: Traffic) -> Capability:
    known = {
        "up_bytes_s": traffic.pace_up.bytes_s,
        "down_bytes_s": traffic.pace_down.bytes_s,
        "round_trip_s": traffic.round_trip_s,
    }
    return msgspec.structs.replace(capability, **{name: value for name, value in known.items() if value is not None})
