"""Training, as the resident device sees it: a job goes in, events come out, an encrypted frame lies in its folder."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from edge_runtime.device.child import Tail, child, describe_end, give
from edge_runtime.device.errors import TrainingError, TrainingInputError
from edge_runtime.training.job import Done, Event, Failed, TrainingJob, decode_event

TRAINING_CHILD = (sys.executable, "-m", "edge_runtime.training.child")


class Trainer(Protocol):
    """Trains one job; cancelling it ends the training."""

    async def train(self, job: TrainingJob, on_event: Callable[[Event], None]) -> Done:
        """Train, reporting every event but the last.

        Returns:
            The last event; the frame lies in ``job.out``.

        Raises:
            TrainingInputError: the user's data or settings are the cause.
            TrainingError: anything else.
        """


class ChildTrainer:
    """Trains in a process of its own, so that its memory goes back to the system after every round.

    Args:
        command: The child's command line; the job, which holds keys, comes on its standard input, which stays open.
    """

    def __init__(self, command: Sequence[str] = TRAINING_CHILD) -> None:
        self._command = tuple(command)

    async def train(self, job: TrainingJob, on_event: Callable[[Event], None]) -> Done:
        """See :class:`Trainer`."""
        async with child(self._command, stdin=True) as process:
            if process.stdin is None or process.stdout is None or process.stderr is None:
                raise TrainingError("training: the child has no pipes: a fault of the runtime")
            tail = Tail()
            reading = asyncio.ensure_future(tail.follow(process.stderr))
            try:
                await give(process.stdin, msgspec.json.encode(job))
                last = await _read_events(process.stdout, on_event)
                code = await process.wait()
                await reading
            finally:
                reading.cancel()
        if isinstance(last, Failed):
            raise (TrainingInputError if last.input else TrainingError)(last.message)
        if last is None or code != 0:
            raise TrainingError(f"training: {describe_end(code, tail.last_line())}")
        return last


async def _read_events(stream: asyncio.StreamReader, on_event: Callable[[Event], None]) -> Done | Failed | None:
    """Pass events on until the stream ends; the event that ended the job, None if there was none."""
    last: Done | Failed | None = None
    while True:
        try:
            line = await stream.readline()
        except ValueError as error:  # what asyncio raises for a line over its limit
            raise TrainingError("training: the child wrote a line that is too long to be an event") from error
        if not line:
            return last
        try:
            event = decode_event(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            text = line[:120].decode("utf-8", "replace").strip()
            raise TrainingError(f"training: the child wrote something that is no event: {text!r}") from error
        if isinstance(event, (Done, Failed)):
            last = event
        else:
            on_event(event)
