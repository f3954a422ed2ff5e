"""The commands of the project as processes of the operating system.

Every process has a session of its own, so that Ctrl-C reaches the demo alone and the demo ends the others, and a log
file with what it wrote to standard error. Leaving :class:`Processes` ends whatever still runs.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from cloud.demo.errors import CommandFailedError

COMMAND = (sys.executable, "-m", "edge_runtime.cli")
_PATIENCE_S = 5.0  # from asking a process to end to ending it
_LINE_CHARS = 300


class Event(NamedTuple):
    """One line of a background process; ``fields`` is None when the process closed its output."""

    source: str
    fields: dict[str, Any] | None


class Processes:
    """Runs commands one after another, or in the background with their JSON lines gathered in one queue."""

    def __init__(self, logs: Path) -> None:
        """``logs`` is where ``NAME.log`` and ``NAME.jsonl`` are written."""
        self._logs = logs
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._events: queue.Queue[Event] = queue.Queue()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(*self._running)

    def call(self, name: str, *arguments: str | Path, told: str = "") -> str:
        """Run a command to its end; return what it printed. ``told`` is its standard input.

        Raises:
            CommandFailedError: its exit status is not 0.
        """
        process = self._start(name, arguments, stdin=subprocess.PIPE)
        output, _ = process.communicate(told)
        self._check(name)
        return output

    def call_json(self, name: str, *arguments: str | Path) -> dict[str, Any]:
        """Run a command with ``--json``; return the object on its last line."""
        lines = self.call(name, *arguments, "--json").strip().splitlines()
        try:
            found: dict[str, Any] = json.loads(lines[-1])
        except (IndexError, ValueError) as error:
            raise CommandFailedError(
                f"{name}: expected one JSON object, got {lines[-1:]}; see {self._log(name)}"
            ) from error
        return found

    def start(self, name: str, *arguments: str | Path) -> None:
        """Run a command in the background; its JSON lines come out of :meth:`events`."""
        process = self._start(name, arguments)
        assert process.stdout is not None  # _start opens a pipe
        threading.Thread(target=self._read, args=(name, process.stdout), daemon=True).start()

    def events(self, *, timeout_s: float) -> Iterator[Event]:
        """Lines of the background processes as they come.

        Raises:
            CommandFailedError: a process ended with another status than 0, or nothing came for ``timeout_s``.
        """
        while True:
            try:
                event = self._events.get(timeout=timeout_s)
            except queue.Empty:
                raise CommandFailedError(f"nothing happened for {timeout_s:.0f} s; see {self._logs}") from None
            if event.fields is None:
                self._check(event.source)
            yield event

    def end(self, *names: str) -> None:
        """Ask processes to end, and end those that do not."""
        for name in names:
            _signal(self._running[name], signal.SIGTERM)
        for name in names:
            process = self._running.pop(name)
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()

    def _start(
        self, name: str, arguments: tuple[str | Path, ...], *, stdin: int = subprocess.DEVNULL
    ) -> subprocess.Popen[str]:
        with self._log(name).open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*COMMAND, *map(str, arguments)],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        self._running[name] = process
        return process

    def _check(self, name: str) -> None:
        status = self._running.pop(name).wait()
        if status:
            lines = self._log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            said = f": {lines[-1][:_LINE_CHARS]}" if lines else ""
            raise CommandFailedError(f"{name} ended with status {status}{said}; see {self._log(name)}")

    def _read(self, name: str, stream: IO[str]) -> None:
        with stream, (self._logs / f"{name}.jsonl").open("w", encoding="utf-8") as log:
            for line in stream:
                log.write(line)
                try:
                    self._events.put(Event(name, json.loads(line)))
                except ValueError:
                    continue  # not an event; it is in the log
        self._events.put(Event(name, None))

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal a process and its children."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # already gone; macOS says "not permitted" of a zombie's group
        return
