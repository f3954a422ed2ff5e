"""The aggregator's side of a scenario: the real one, on a folder of its own, as a process that may die."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from safetensors.numpy import load_file

from cloud import audit, events
from cloud.config import Config
from cloud.errors import CloudError, DataError, DataFullError
from cloud.keys import Keys
from cloud.service import Aggregator, Surroundings
from edge_runtime.bundle import Bundle
from edge_runtime.wire import StorageFullError, UnavailableError, WireError
from tests.simulation.ledger import Array, Ledger, Round, Row, demand
from tests.simulation.loop import Process, SimulatedLoop

START = 1_700_000_000.0  # Unix time at which every scenario begins
_ROWS = "SELECT round, device, digest, weight FROM updates"
_ROUNDS = "SELECT round, state, round_key FROM rounds ORDER BY round"
_UNLIMITED = 1 << 30  # pages


@dataclass(frozen=True)
class Task:
    """What all scenarios share: config, bundle and keys."""

    config: Config
    bundle: Bundle
    keys: Keys
    folder: Path  # what a server's data folder begins as


class ServerDownError(Exception):
    """Nobody answers, or the process ended before it did."""


class Server:
    """One server, over all its processes."""

    def __init__(self, task: Task, folder: Path, loop: SimulatedLoop, rng: random.Random, ledger: Ledger) -> None:
        self.aggregator: Aggregator | None = None
        self.process: Process | None = None
        self.folder = folder / "server.0"
        self._task, self._parent, self._loop, self._rng, self._ledger = task, folder, loop, rng, ledger
        self._full = False
        self._made: list[Aggregator] = []  # kept until the end, dead or not
        shutil.copytree(task.folder, self.folder)

    @property
    def up(self) -> bool:
        """Whether it answers."""
        return self.aggregator is not None and self.process is not None and not self.process.dead

    def clock(self) -> float:
        """Unix seconds."""
        return START + self._loop.time()

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
        self.process = process = Process(self._loop, "server", self._keep_files)
        process.full = self._full
        surroundings = Surroundings(self.clock, self._rng.randbytes, self._report)
        self.aggregator = None
        aggregator = process.run(self._make, surroundings)
        self._made.append(aggregator)
        start = process.spawn(aggregator.start())
        await asyncio.wait({start, process.died}, return_when=asyncio.FIRST_COMPLETED)
        if process.dead:
            return
        if start.exception() is not None:
            error = start.exception()
            if not (isinstance(error, DataFullError) and self._full):
                self._ledger.surprises.append(f"the server does not start: {error!r}")
            process.end()
            return
        self.aggregator = aggregator

    def _make(self, surroundings: Surroundings) -> Aggregator:
        task = self._task
        aggregator = Aggregator(
            task.config, task.bundle, keys=task.keys, folder=self.folder, surroundings=surroundings
        )
        # The one private name that is used here: there is no other way to a database's limit and statements.
        sa.event.listen(aggregator._database._engine, "connect", self._on_connect)
        return aggregator

    def _on_connect(self, connection: Any, _record: object) -> None:
        process = self.process
        assert process is not None, "a process connects"
        connection.set_trace_callback(lambda text: process.instant(f"sql {text}"))
        self._limit(connection)

    def _limit(self, connection: Any) -> None:
        """A full disk: the database may not grow. SQLite never goes below the pages that it has."""
        connection.execute(f"PRAGMA max_page_count={1 if self._full else _UNLIMITED}")

    async def close(self) -> None:
        """End in good order."""
        if self.up:
            assert self.aggregator is not None, "it is up"
            assert self.process is not None, "it is up"
            process, closing = self.process, self.process.spawn(self.aggregator.close())
            self.aggregator = None
            await asyncio.wait({closing, process.died}, return_when=asyncio.FIRST_COMPLETED)
            if not process.dead:
                closing.result()
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
        if self.process is not None:
            self.process.full = full
        if self.up:
            self._limit(self._connection())

    def bury(self) -> None:
        """Close what dead processes left open."""
        for aggregator in self._made:
            aggregator._database._engine.dispose()

    # Requests

    async def call(
        self, make: Callable[[Aggregator], Coroutine[Any, Any, Any]], *, cut_s: float | None = None
    ) -> Any:
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
            demand(self._full, "13: the server says that its disk is full, which it is not")
            return StorageFullError("the aggregator's disk is full, nothing of this was kept; try again later")
        except CloudError as error:
            self._surprise(f"a request: {error!r}", error)
            return UnavailableError("the aggregator cannot do this now; try again later")
        except Exception as error:  # noqa: BLE001 - as in the real handler; here it is what the scenario looks for
            self._ledger.surprises.append(f"a request: {error!r}")
            return UnavailableError("the aggregator failed; try again later")

    def _surprise(self, text: str, error: CloudError) -> None:
        if not (self._full and isinstance(error, DataError)):
            self._ledger.surprises.append(text)

    def _report(self, event: events.Event) -> None:
        if isinstance(event, events.WorkFailed) and not self._full:
            self._ledger.surprises.append(f"{event.what}: {event.detail}")

    # What is there

    def check(self) -> None:
        """Check the database, and that what the aggregator has in memory agrees with it."""
        if not self.up:
            return
        connection = self._connection()
        rows = [Row(*row) for row in connection.execute(_ROWS)]
        self._ledger.check(rows, [Round(*row) for row in connection.execute(_ROUNDS)])

    def check_audit(self) -> None:
        """Check the audit log as ``emberlora cloud audit verify`` does."""
        assert self.aggregator is not None, "it is up"
        found = self.aggregator._database.audited()
        broken = audit.check_chain(found.links) or audit.check_facts(found.links, found.facts)
        demand(broken is None, f"11: {broken}")

    def published(self) -> dict[str, Array]:
        """The adapter that the operator may take, by our names."""
        tensors = load_file(self.folder / "published" / "adapter_model.safetensors")
        return {
            name.removeprefix("base_model.model.").removesuffix(".weight").replace("lora_A", "lora_a").replace("lora_B", "lora_b"): array
            for name, array in tensors.items()
        }

    def _connection(self) -> Any:
        """The database's one connection; between two steps of the loop no transaction is open on it."""
        assert self.aggregator is not None, "it is up"
        return self.aggregator._database._engine.raw_connection().driver_connection
