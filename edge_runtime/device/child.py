"""Child processes that never outlive their reason: started, read, and ended whatever happens to the caller."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

_TAIL_BYTES = 4 << 10  # of what a child writes to standard error
_LINE_BYTES = 1 << 20
_TERMINATE_S = 5.0


@dataclass(frozen=True)
class Ended:
    """How a child ended: its output, its exit code (negative: a signal), the last line of its standard error."""

    output: bytes
    code: int
    last_line: str

    def describe(self) -> str:
        """One line for the user."""
        return describe_end(self.code, self.last_line)


def describe_end(code: int, last_line: str) -> str:
    """One line for the user about a child's end."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " (often: the system was out of memory)" if code == -signal.SIGKILL else ""
        return f"the process was ended by {name}{hint}"
    return f"the process ended with code {code}" + (f": {last_line}" if last_line else "")


class Tail:
    """The end of a stream, bounded."""

    def __init__(self) -> None:
        self._data = b""

    async def follow(self, stream: asyncio.StreamReader) -> None:
        """Read until the end."""
        while piece := await stream.read(_TAIL_BYTES):
            self._data = (self._data + piece)[-_TAIL_BYTES:]

    def last_line(self) -> str:
        """The last line that says something, at most 300 characters."""
        lines = self._data.decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else ""


@contextlib.asynccontextmanager
async def child(command: Sequence[str], *, stdin: bool = False) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a child and make sure that it has ended when the block is left.

    It has a session of its own, so that Ctrl-C reaches only the parent, which ends it in good order: SIGTERM, and
    SIGKILL after five seconds.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        await _end(process)


async def run_child(command: Sequence[str], job: bytes) -> Ended:
    """Give a child its job, one line, and collect its output.

    Its standard input stays open, so that it can end with this process (:mod:`edge_runtime.training.held`).
    """
    async with child(command, stdin=True) as process:
        assert process.stdin is not None, "a pipe was asked for"
        assert process.stdout is not None, "a pipe was asked for"
        assert process.stderr is not None, "a pipe was asked for"
        await give(process.stdin, job)
        output, errors = await asyncio.gather(process.stdout.read(), process.stderr.read())
        await process.wait()
    tail = errors[-_TAIL_BYTES:].decode("utf-8", "replace").strip().splitlines()
    return Ended(output, process.returncode or 0, tail[-1].strip()[:300] if tail else "")


async def give(stream: asyncio.StreamWriter, job: bytes) -> None:
    """Write a job as one line; a child that has ended by then is told from its output."""
    with contextlib.suppress(ConnectionError):
        stream.write(job + b"\n")
        await stream.drain()


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):  # it ended by itself just now
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _TERMINATE_S)
    except asyncio.TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
