"""An event loop with a clock of its own and no threads, and processes on it that die like processes.

Time passes only when nothing else is left to do: then it jumps to the next timer. So a scenario of an hour takes as
long as its work, the real code sleeps and waits as it always does, and the same seed gives the same order of events.

What the code hands to threads (database, blobs, sums) runs here in the loop, in the order it was handed over; its
answer comes back at once or some milliseconds later, drawn by the seed, so that tasks overtake each other.

A :class:`Process` is a set of tasks and a folder. Killed, it leaves its files as they are at that instant and none of
its tasks runs another line that anyone could see: no ``finally``, no rollback. It dies at *instants*, which have names:

- ``before NAME`` and ``after NAME`` of every function that is handed to a thread, such as ``add_updates``;
- ``fsync``, ``replace`` and ``unlink``, before they happen;
- ``sql TEXT``, before the database runs a statement that starts so; a transaction that is open is lost;
- those that the simulation names itself, such as ``request upload``.

What is not simulated: a power cut that tears a write or loses what was not synced, and a kill within one commit of
SQLite. ``tests/crash`` kills real processes.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import functools
import os
import random
import sqlite3
import stat
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)
_DELAYS_S = (0.0, 0.0, 0.001, 0.004)


class StuckError(Exception):
    """The scenario has not ended, and no timer and no task is left, or one has failed where nobody sees it."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """Jumps over waiting; ``rng`` draws how long threads take to answer."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.errors: list[dict[str, Any]] = []
        self._rng = rng
        self._now = 0.0
        self._burying = False
        self._frozen: list[Callable[[], object]] = []  # what dead processes would have done next
        self._selector = self  # what BaseEventLoop waits with; it asks for select() only
        self._kept: list[asyncio.Task[Any]] = []  # what is collected is closed, and that runs its code
        self.set_task_factory(self._make_task)
        self.set_exception_handler(lambda _, context: self.errors.append(context))

    def time(self) -> float:
        """Seconds since the scenario began."""
        return self._now

    def select(self, timeout: float | None) -> list[object]:
        """Wait, which takes no time."""
        if self.errors and not self._burying:  # whoever waits for what failed would wait for ever, others ask for ever
            raise StuckError(f"a callback failed: {self.errors}")
        if timeout is None:
            raise StuckError("nothing is left to happen")
        if timeout > 0:
            self._now = max(self._now, self._scheduled[0].when())  # type: ignore[attr-defined]
        return []

    def _process_events(self, event_list: list[object]) -> None:
        """There are none: no sockets."""

    def _write_to_self(self) -> None:
        """Nobody else's thread wakes this loop."""

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **options)
        self._kept.append(task)
        return task

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        """As ever, unless the process that it belongs to dies before."""
        return super().call_soon(self._while_alive(callback, context), *args, context=context)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        """As ever, unless the process that it belongs to dies before."""
        return super().call_at(when, self._while_alive(callback, context), *args, context=context)

    def _while_alive(self, callback: Callable[..., object], context: Any) -> Callable[..., object]:
        process = PROCESS.get() if context is None else context.get(PROCESS)
        if process is None:
            return callback

        def call(*args: Any) -> None:
            if self._burying or not process.dead:
                callback(*args)
            else:
                self._frozen.append(functools.partial(contextvars.copy_context().run, callback, *args))

        return call

    def run_in_executor(self, executor: object, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Run ``func`` in this thread, after what was handed over before."""
        future: asyncio.Future[Any] = self.create_future()
        process, name = PROCESS.get(), _name(func)

        def work() -> None:
            if process is not None:
                process.instant(f"before {name}")
            if process is not None and process.dead and not self._burying:
                return
            try:
                settle: Callable[..., object] = functools.partial(future.set_result, func(*args))
            except Exception as error:  # noqa: BLE001 - it is the caller's
                settle = functools.partial(future.set_exception, error)
            if process is not None:
                process.instant(f"after {name}")
            delay = self._rng.choice(_DELAYS_S)
            self.call_later(delay, lambda: None if future.done() else settle())

        self.call_soon(work)
        return future

    def bury(self) -> None:
        """Let the tasks that are left unwind; nobody looks any more."""
        self._burying = True
        self.errors = []
        for _ in range(20):
            tasks = asyncio.all_tasks(self)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            for step in self._frozen:  # a task that has never begun only ends by beginning
                self.call_soon(step)
            self._frozen = []
            self.run_until_complete(asyncio.wait(tasks, timeout=1.0))
        self.close()


def _name(func: Callable[..., Any]) -> str:
    """The name of what was really handed over."""
    while isinstance(func, functools.partial):
        # asyncio.to_thread hands over Context.run(function, …)
        inner = func.args[0] if getattr(func.func, "__name__", "") == "run" else func.func
        func = inner
    return str(getattr(func, "__name__", type(func).__name__))


@dataclass
class _Armed:
    at: str
    left: int  # instants
    action: Callable[[], None]


class Process:
    """Tasks that die together.

    Args:
        loop: Theirs.
        name: For people.
        on_kill: Called at the instant of death, to keep the files as they are.
    """

    def __init__(self, loop: SimulatedLoop, name: str, on_kill: Callable[[], None]) -> None:
        self.name = name
        self.dead = False
        self.full = False  # whether its disk is
        self.connection: Connection | None = None  # to its database
        self.died: asyncio.Future[None] = loop.create_future()
        self.tasks: list[asyncio.Task[Any]] = []
        self._loop = loop
        self._on_kill = on_kill
        self._armed: list[_Armed] = []
        self._context = contextvars.copy_context()
        self._context.run(PROCESS.set, self)

    def fill(self, full: bool) -> None:
        """Let its disk be full, or have room again."""
        self.full = full
        if self.connection is not None and not self.dead:
            self.connection.limit(full)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task of this process."""
        task: asyncio.Task[Any] = self._context.copy().run(self._loop.create_task, work)
        self.tasks.append(task)
        return task

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function as this process does."""
        return self._context.copy().run(function, *args)

    def arm(self, at: str, nth: int, action: Callable[[], None]) -> None:
        """Do something at the ``nth`` instant from now whose name starts with ``at``; at once if that is "now"."""
        if at == "now":
            action()
        else:
            self._armed.append(_Armed(at, nth, action))

    def disarm(self) -> None:
        """Live on."""
        self._armed = []

    def instant(self, name: str) -> None:
        """Something may happen here."""
        if self.dead:
            return
        for armed in [armed for armed in self._armed if name.startswith(armed.at)]:
            armed.left -= 1
            if not armed.left:
                self._armed.remove(armed)
                armed.action()

    def kill(self) -> None:
        """``kill -9``."""
        if not self.dead:
            self._on_kill()
            self.end()

    def end(self) -> None:
        """It is no more: none of its tasks goes on."""
        self.dead = True
        if not self.died.done():
            self.died.set_result(None)


class Connection(sqlite3.Connection):
    """A database's connection; its statements are instants of the process that made it.

    On a full disk the database may not grow, and its write-ahead log cannot be emptied: both do happen to real ones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process = PROCESS.get()
        if self.process is not None:
            self.process.connection = self
            self.limit(self.process.full)

    def limit(self, full: bool) -> None:
        """Take all room away, or give it back. SQLite never goes below the pages that it has."""
        super().execute(f"PRAGMA max_page_count={1 if full else 1 << 30}")

    def close(self) -> None:
        """As ever; whatever happens to the disk then is nothing to it."""
        super().close()
        if self.process is not None and self.process.connection is self:
            self.process.connection = None

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """A cursor that tells its statements."""
        return super().cursor(_Cursor)

    def commit(self) -> None:
        """The driver's own statement."""
        if self.process is not None:
            self.process.instant("sql COMMIT")
        super().commit()


class _Cursor(sqlite3.Cursor):
    def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
        self._tell(sql)
        return super().execute(sql, *args)

    def executemany(self, sql: str, *args: Any) -> sqlite3.Cursor:
        self._tell(sql)
        return super().executemany(sql, *args)

    def _tell(self, sql: str) -> None:
        process = self.connection.process
        if process is not None:
            process.instant(f"sql {sql}")
            if process.full and sql.startswith("PRAGMA wal_checkpoint"):
                raise sqlite3.OperationalError("database or disk is full")


@contextmanager
def disk() -> Iterator[None]:
    """Within this, what touches a disk is an instant of its process, and a file on a full disk cannot be synced."""
    connect = functools.partial(sqlite3.connect, factory=Connection)
    with (
        mock.patch.object(sqlite3.dbapi2, "connect", connect),
        mock.patch.object(os, "fsync", _fsync(os.fsync)),
        mock.patch.object(Path, "replace", _instant("replace", Path.replace)),
        mock.patch.object(Path, "unlink", _instant("unlink", Path.unlink)),
    ):
        yield


def _fsync(real: Callable[[int], None]) -> Callable[[int], None]:
    def fsync(descriptor: int) -> None:
        process = PROCESS.get()
        if process is not None:
            process.instant("fsync")
            if process.full and stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    return fsync


def _instant(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Path, *args: Any, **kwargs: Any) -> Any:
        process = PROCESS.get()
        if process is not None:
            process.instant(name)
        return real(path, *args, **kwargs)

    return call
