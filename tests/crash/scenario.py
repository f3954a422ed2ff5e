"""One scenario: a task of two rounds and two devices, whose processes are killed until it has ended all the same.

A seed says which process dies at which point, and how often and after how long a life the others, and it again, are
killed at random times. What these times meet is up to the system, so a seed is a name and not a repetition; what was
killed, and the scenario's folder, are told when an invariant (:mod:`tests.crash.ledger`) breaks.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tests.crash.child import WEIGHTS
from tests.crash.ledger import BrokenError, Ledger, demand
from tests.crash.points import POINTS, SERVER, Point
from tests.crash.site import DeviceProcess, ServerProcess, free_port, point_homes_at, processes_of

SERVER_LIVES_S, DEVICE_LIVES_S = (0.2, 2.5), (0.05, 1.5)
PAUSE_S = 0.3  # at most, from a death to the next life
_STEP_S = 0.01
_PATIENCE_S = 120.0  # for what takes three seconds
_SIGKILL = -9


def point_of(seed: int) -> Point:
    """The point at which a process of this seed dies; 20 seeds in a row have them all."""
    return POINTS[seed % len(POINTS)]


class Life:
    """One place, server or device, and its processes one after the other.

    Args:
        place: "server" or the device's name.
        rng: For the pauses between two lives.
        deaths: How long its processes live that are killed at random times; the last one is left alone.
        fused: Whether the first one dies at the point before any of these is killed.
    """

    def __init__(self, place: str, rng: random.Random, *, deaths: list[float], fused: bool) -> None:
        self.place, self.fused = place, fused
        self.process: ServerProcess | DeviceProcess | None = None
        self.killed = 0
        self.begins = 0.0  # not before this time
        self._rng, self._deaths = rng, deaths

    def died(self, told: list[str]) -> bool:
        """Kill the process if its time has come; whether it is dead by now, killed."""
        if self.process is None:
            return False
        code = self.process.code
        if code is None and not self.fused and self._deaths and self.age > self._deaths[0]:
            self.process.kill()
            told.append(f"{self.place} after {self._deaths.pop(0):.2f} s")
        elif code is not None and self.fused:
            demand(code == _SIGKILL, f"{self.place} ended with {code} and did not come to its point")
            told.append(f"{self.place} at its point after {self.age:.2f} s")
            self.fused = False
        else:
            return False
        self.killed += 1
        self.process, self.begins = None, time.monotonic() + self._rng.uniform(0, PAUSE_S)
        return True

    @property
    def age(self) -> float:
        """Seconds since its process was started."""
        return 0.0 if self.process is None else time.monotonic() - self.process.began


class Scenario:
    """Made with :meth:`run`."""

    def __init__(self, folder: Path, seed: int) -> None:
        rng = random.Random(seed)
        self._folder = folder
        self._point = point_of(seed)
        self._nth = rng.randint(1, self._point.most)
        self._port = free_port(rng)
        self._ledger = Ledger(folder)
        self._awaited = True  # that the server answers
        self.told: list[str] = []
        self.restarts_s: list[float] = []
        self.place = self._point.place if self._point.place != "device" else rng.choice(list(WEIGHTS))
        self.lives = {SERVER: self._life(SERVER, rng, SERVER_LIVES_S, (1, 1, 2))}
        for name in WEIGHTS:
            self.lives[name] = self._life(name, rng, DEVICE_LIVES_S, (0, 1, 2))

    def _life(self, name: str, rng: random.Random, lives_s: tuple[float, float], counts: tuple[int, ...]) -> Life:
        deaths = [rng.uniform(*lives_s) for _ in range(rng.choice(counts))]
        return Life(name, rng, deaths=deaths, fused=name == self.place)

    def run(self) -> None:
        """Until the task has ended everywhere.

        Raises:
            BrokenError: an invariant does not hold.
        """
        point_homes_at(self._folder, self._port)
        self._ledger.check_store()
        try:
            end = time.monotonic() + _PATIENCE_S
            while not self._ended():
                demand(time.monotonic() < end, "9: it does not end")
                for life in self.lives.values():
                    self._step(life)
                time.sleep(_STEP_S)
            self._finish()
        except BrokenError as error:
            raise BrokenError(f"{error}\n{self.describe()}") from error
        finally:
            for life in self.lives.values():
                if life.process is not None and life.process.code is None:
                    life.process.kill()

    def describe(self) -> str:
        """What was killed."""
        return f"{self._point.name!r}, time {self._nth}; killed: {'; '.join(self.told) or 'nothing'}; {self._folder}"

    def _ended(self) -> bool:
        """Whether both devices have ended by themselves, and the server answers."""
        processes = [self.lives[name].process for name in WEIGHTS if not self.lives[name].fused]
        return not self._awaited and [one.code for one in processes if one is not None] == [0] * len(WEIGHTS)

    def _step(self, life: Life) -> None:
        """Kill it, start it, or hear whether it answers."""
        if life.died(self.told):
            if life.place == SERVER:
                self._awaited = True
                self._ledger.check_store()
        elif life.process is None:
            if time.monotonic() >= life.begins:
                self._start(life)
        elif isinstance(life.process, ServerProcess):
            self._hear(life, life.process)
        else:
            demand(life.process.code in (None, 0), f"9: {life.place} ended with {life.process.code}")

    def _start(self, life: Life) -> None:
        point, nth = (self._point, self._nth) if life.fused else (None, 0)
        if life.place == SERVER:
            life.process = ServerProcess(self._folder, self._port, point, nth)
        else:
            life.process = DeviceProcess(self._folder, life.place, point, nth)

    def _hear(self, life: Life, server: ServerProcess) -> None:
        demand(server.code is None, f"9: the server ended with {server.code}")
        if self._awaited and server.answers():
            seconds, started = server.age_s, server.started()
            if started is not None:  # it may be killed in between
                self._awaited = False
                self.restarts_s.append(seconds)
                self._ledger.check_restart(started, seconds)

    def _finish(self) -> None:
        """Wait for what is done after the last round, stop the server and check everything."""
        left = [life.place for life in self.lives.values() if life.fused]
        demand(not left, f"{left} did not come to its point")
        server = self.lives[SERVER].process
        updates = self._folder / "site" / "data" / "blobs" / "updates"
        _wait(lambda: not any(updates.iterdir()))
        if isinstance(server, ServerProcess):
            code = server.stop()
            demand(code == 0, f"9: the server ended with {code}")
        _wait(lambda: not processes_of(self._folder))
        self._ledger.check_end()
        demand(not processes_of(self._folder), f"8: still running: {processes_of(self._folder)}")


def _wait(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Until it holds, or a while; what follows checks whether it does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(_STEP_S)


def run(task: Path, folder: Path, seed: int) -> Scenario:
    """Run the scenario of a seed on a copy of a task; the copy is left to be looked at when an invariant breaks.

    Raises:
        BrokenError: an invariant does not hold.
    """
    shutil.copytree(task, folder)
    scenario = Scenario(folder, seed)
    scenario.run()
    shutil.rmtree(folder)
    return scenario
