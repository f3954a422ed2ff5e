"""The aggregator's side of a scenario: the real one, on a folder of its own, as a process that may die."""

from __future__ import annotations

import asyncio
import functools
import random
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from cloud import audit, events
from cloud.config import Config
from cloud.errors import CloudError, DataError, DataFullError
from cloud.http.parts import PartsDesk
from cloud.keys import KEYS_FOLDER, load_keys
from cloud.service import Aggregator, Surroundings
from edge_runtime.bundle import Bundle
from edge_runtime.wire import StorageFullError, UnavailableError, WireError
from tests.simulation.ledger import Array, Ledger, Round, Row, demand
from tests.simulation.loop import Process, SimulatedLoop

START = 1_700_000_000.0  # Unix time at which every scenario begins
_SHUTDOWN_S = 10
_FIRST: dict[str, Any] = {}
_ROWS = "SELECT round, device, digest, weight FROM updates"
_ROUNDS = "SELECT round, state, round_key FROM rounds ORDER BY round"


@dataclass(frozen=True)
class Task:
    """What all scenarios share: config, bundle and a data folder, keys in it."""

    config: Config
    bundle: Bundle
    folder: Path  # what a server's data folder begins as


def _share_compiled(engine: Any) -> None:
    """Let all engines compile a statement once: that is a tenth of the time. The names are private, and only speed
    depends on them."""
    first = _FIRST.setdefault("engine", engine)
    engine.dialect = engine.pool._dialect = first.dialect
    engine._compiled_cache = first._compiled_cache


class ServerDownError(Exception):
    """Nobody answers, or the process ended before it did."""


class Server:
    """One server, over all its processes."""

    def __init__(self, task: Task, folder: Path, loop: SimulatedLoop, rng: random.Random, ledger: Ledger) -> None:
        self.aggregator: Aggregator | None = None
        self.desk: PartsDesk | None = None
        self.process: Process | None = None
        self.folder = folder / "server.0"
        self._task, self._parent, self._loop, self._rng, self._ledger = task, folder, loop, rng, ledger
        self._full = self._was_full = False  # an error of a full disk may be told when there is room again
        self.processes: list[Process] = []
        self.skew_s = 0.0
        self._requests: set[asyncio.Task[Any]] = set()  # that run
        shutil.copytree(task.folder, self.folder)

    @property
    def up(self) -> bool:
        """Whether it answers."""
        return self.aggregator is not None and self.process is not None and not self.process.dead

    def clock(self) -> float:
        """Unix seconds, as its host says."""
        return START + self._loop.time() + self.skew_s

    @property
    def bundle(self) -> Bundle:
        """The task's."""
        return self._task.bundle

    @property
    def task_name(self) -> str:
        """The task's."""
        return self._task.config.task.name

    # Life

    async def start(self) -> None:
        """Start on the folder, if it does not run; a full disk may forbid that."""
        if self.process is not None and not self.process.dead:
            return
        self._requests = set()
        self.process = process = Process(self._loop, "server", self._keep_files)
        process.full = self._full
        surroundings = Surroundings(self.clock, self._rng.randbytes, self._report)
        self.aggregator = None
        task = self._task
        make = functools.partial(
            Aggregator, keys=load_keys(self.folder / KEYS_FOLDER), folder=self.folder, surroundings=surroundings
        )
        aggregator = process.run(make, task.config, task.bundle)
        self.desk = PartsDesk(aggregator)
        _share_compiled(aggregator._database._engine)
        self.processes.append(process)
        start = process.spawn(aggregator.start())
        await asyncio.wait({start, process.died}, return_when=asyncio.FIRST_COMPLETED)
        if process.dead:
            return
        if start.exception() is not None:
            error = start.exception()
            if not (isinstance(error, DataFullError) and self._was_full):
                self._ledger.surprises.append(f"the server does not start: {error!r}")
            process.end()
            return
        self.aggregator = aggregator

    async def close(self) -> None:
        """End in good order, as :class:`cloud.http.server.Server` does: requests that run are finished."""
        if not self.up:
            return
        assert self.aggregator is not None, "it is up"
        assert self.process is not None, "it is up"
        process, aggregator = self.process, self.aggregator
        self.aggregator = None

        async def end() -> None:
            aggregator.drain()
            if self._requests:
                await asyncio.wait(self._requests, timeout=_SHUTDOWN_S)
            await aggregator.close()

        ending = process.spawn(end())
        await asyncio.wait({ending, process.died}, return_when=asyncio.FIRST_COMPLETED)
        if not process.dead:
            ending.result()
            process.end()

    def _keep_files(self) -> None:
        """The folder as it is at this instant is what the next process finds; this one's is out of sight."""
        number = int(self.folder.suffix[1:]) + 1
        kept = self._parent / f"server.{number}"
        shutil.copytree(self.folder, kept, symlinks=True, ignore=shutil.ignore_patterns("*-shm"))
        self.folder = kept
        self.aggregator = None

    def fill(self, full: bool) -> None:
        """Let the disk be full, or have room again."""
        self._full = full
        self._was_full |= full
        if self.process is not None:
            self.process.fill(full)

    def bury(self) -> None:
        """Close what dead processes left open."""
        for process in self.processes:
            if process.connection is not None:
                process.connection.close()

    # Requests

    async def call(self, make: Callable[[Aggregator], Coroutine[Any, Any, Any]], *, cut_s: float | None = None) -> Any:
        """Carry out a request in the server's process, as its HTTP handlers do.

        Args:
            make: The handler.
            cut_s: After so many seconds the caller hangs up, and the handler is cancelled.

        Raises:
            ServerDownError: no answer.
            WireError: its answer.
        """
        if not self.up:
            raise ServerDownError("connection refused")
        assert self.aggregator is not None, "it is up"
        assert self.process is not None, "it is up"
        process, aggregator = self.process, self.aggregator
        task = process.spawn(self._answer(make, aggregator))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        await asyncio.wait({task, process.died}, return_when=asyncio.FIRST_COMPLETED, timeout=cut_s)
        if not task.done():
            task.cancel()
            raise ServerDownError("connection reset")
        answer = task.result()
        if isinstance(answer, WireError):
            raise answer
        return answer

    async def _answer(self, make: Callable[[Aggregator], Coroutine[Any, Any, Any]], aggregator: Aggregator) -> Any:
        """What cloud.http.problems makes of an error, as a value."""
        try:
            return await make(aggregator)
        except WireError as error:
            return error
        except DataFullError:
            demand(self._was_full, "13: the server says that its disk is full, which it is not")
            return StorageFullError("the aggregator's disk is full, nothing of this was kept; try again later")
        except CloudError as error:
            self._surprise(f"a request: {error!r}", error)
            return UnavailableError("the aggregator cannot do this now; try again later")
        except Exception as error:  # noqa: BLE001 - as in the real handler; here it is what the scenario looks for
            self._ledger.surprises.append(f"a request: {error!r}")
            return UnavailableError("the aggregator failed; try again later")

    def _surprise(self, text: str, error: CloudError) -> None:
        if not (self._was_full and isinstance(error, DataError)):
            self._ledger.surprises.append(text)

    def _report(self, event: events.Event) -> None:
        if isinstance(event, events.WorkFailed) and not self._was_full:
            self._ledger.surprises.append(f"{event.what}: {event.detail}")

    # What is there

    def check(self) -> None:
        """Check the database, and that what the aggregator has in memory agrees with it."""
        if not self.up or self.process is None or self.process.connection is None:
            return
        # Between two steps of the loop no transaction is open on it.
        connection = self.process.connection
        rows = [Row(*row) for row in connection.execute(_ROWS)]
        self._ledger.check(rows, [Round(*row) for row in connection.execute(_ROUNDS)])

    def check_audit(self) -> None:
        """Check the audit log as ``emberlora cloud audit verify`` does."""
        assert self.aggregator is not None, "it is up"
        found = self.aggregator._database.audited()  # there is no other way to it while the server runs
        broken = audit.check_chain(found.links) or audit.check_facts(found.links, found.facts)
        demand(broken is None, f"11: {broken}")

    def published(self) -> dict[str, Array]:
        """The adapter that the operator may take, by our names."""
        tensors = load_file(self.folder / "published" / "adapter_model.safetensors")
        renamed = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
        found = {}
        for name, array in tensors.items():
            for theirs, ours in renamed.items():
                if name.endswith(theirs):
                    found[name.removeprefix("base_model.model.").removesuffix(theirs) + ours] = array
        return found
