"""A running device's events on the terminal, or as JSON lines."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Protocol

import click
import msgspec

from edge_runtime.device import events
from edge_runtime.device.eligibility import Obstacle
from edge_runtime.terminal import Terminal


class Display(Protocol):
    """Receives every event; closed once at the end."""

    def show(self, event: events.DeviceEvent) -> None:
        """Show one event."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class JsonDisplay:
    """One JSON object a line on standard output.

    Args:
        progress_s: Seconds from one event within a training or a measuring to the next; those between are left out,
            but for the last. For a journal, which keeps everything.
        clock: Seconds that never go back.
    """

    def __init__(self, progress_s: float = 0.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress_s = progress_s
        self._clock = clock
        self._next_s = -math.inf

    def show(self, event: events.DeviceEvent) -> None:
        """See :class:`Display`."""
        if self._wanted(event):
            click.echo(msgspec.json.encode(event))

    def _wanted(self, event: events.DeviceEvent) -> bool:
        if isinstance(event, events.StepDone):
            last = event.step == event.steps
        elif isinstance(event, events.MeasuredPart):
            last = event.examples == event.of
        else:
            return True
        if not last and self._clock() < self._next_s:
            return False
        self._next_s = self._clock() + self._progress_s
        return True

    def close(self) -> None:
        """Nothing to do."""


_PERSONAL = {"head": "the classifier's head", "B": "factor B"}


class TerminalDisplay:
    """A line per round, and a step bar while training when the output is a terminal."""

    def __init__(self, terminal: Terminal | None = None) -> None:
        self._terminal = terminal or Terminal(sys.stdout)
        self._rounds = 0
        self._state = ""  # of the plan
        self._noticed: set[str] = set()
        self._trained: events.TrainedRound | None = None
        self._evaluated = ""

    def show(self, event: events.DeviceEvent) -> None:
        """See :class:`Display`."""
        if isinstance(event, events.StepDone):
            text = f"{self._name(event.round)} · loss {event.loss:.3f}"
            self._terminal.progress(event.step, event.steps, text)
            return
        if isinstance(event, events.MeasuredPart):
            self._terminal.progress(event.examples, event.of, f"{self._name(event.round)} · measuring class means")
            return
        if not isinstance(event, (events.Noticed, events.EvaluatedRound, events.ModulesStilled)):
            self._terminal.close()
        if isinstance(event, events.Planned):
            self._rounds = event.rounds
            self._state = event.state
        elif isinstance(event, events.EvaluatedRound):
            share = event.correct / event.examples if event.examples else 0.0
            self._evaluated = f"held-out loss {event.loss:.3f}" + (f", accuracy {share:.3f}" if event.correct else "")
        elif isinstance(event, events.TrainedRound):
            self._trained = event
        line = self._line(event)
        if line:
            self._terminal.say(line)

    def close(self) -> None:
        """See :class:`Display`."""
        self._terminal.close()

    def _line(self, event: events.DeviceEvent) -> str:
        if isinstance(event, events.Planned):
            return self._planned_line(event)
        if isinstance(event, events.Fetched):
            what = "the last adapter" if self._state == "finished" else self._name(event.round)
            return f"{what}: {size(event.bytes)} fetched" if event.bytes else ""
        if isinstance(event, events.Noticed):
            return self._once(event.text)  # the same data says the same in every round
        if isinstance(event, events.TrainingResumed):
            return f"{self._name(event.round)}: goes on after step {event.step} of {event.steps}"
        if isinstance(event, events.Uploaded):
            return self._round_line(event)
        if isinstance(event, events.Skipped):
            return f"{self._name(event.round)}: left out ({event.reason}): {event.detail}"
        return _plain_line(event)

    def _planned_line(self, event: events.Planned) -> str:
        if event.state == "measure":
            return f"{self._name(event.round)}: measuring class means"
        if not event.personal:
            return ""
        what = " and ".join(_PERSONAL[part] for part in event.personal)
        return self._once(f"trained on this device and never sent: {what}")

    def _once(self, text: str) -> str:
        """The text the first time, then nothing."""
        new = text not in self._noticed
        self._noticed.add(text)
        return text if new else ""

    def _round_line(self, event: events.Uploaded) -> str:
        parts = [f"{self._name(event.round)}: update sent, {size(event.bytes)}, weight {event.weight}"]
        trained = self._trained
        if trained is not None and trained.round == event.round:
            if trained.loss_start is not None and trained.loss_end is not None:
                parts.append(f"loss {trained.loss_start:.3f} → {trained.loss_end:.3f}")
            if trained.seconds is not None:
                done = "class means measured" if self._state == "measure" else f"{trained.steps} steps"
                parts.append(f"{done} in {duration(trained.seconds)}")
            if trained.tier:
                parts.append(f"tier {trained.tier}")
            if trained.examples < trained.of_examples:
                parts.append(f"{trained.examples} of {trained.of_examples} examples")
            if trained.skipped:
                parts.append(f"{trained.skipped} steps of still modules left out")
        if self._evaluated:
            parts.append(self._evaluated)
        self._evaluated = ""
        return " · ".join(parts)

    def _name(self, round_: int) -> str:
        """Rounds are numbered from 0 on the wire and counted from 1 for people."""
        return f"round {round_ + 1}" + (f" of {self._rounds}" if self._rounds else "")


def _plain_line(event: events.DeviceEvent) -> str:
    """The line of an event that needs no other to be told."""
    if isinstance(event, events.Encrypted):
        return encrypted_line(event)
    if isinstance(event, events.Started):
        return f"{event.device} takes part in task {event.task} at {event.server}"
    if isinstance(event, events.PlanKeyChanged):
        return f"plans are signed with a new key now, {event.plan_key[:12]}; the one before has said so"
    if isinstance(event, events.Waiting):
        waited = f" for {duration(event.waited_s)}" if event.waited_s >= 1 else ""
        return f"waiting{waited}: {event.detail}; next try in {duration(event.retry_s)}"
    if isinstance(event, events.Held):
        return f"training is held: {_texts(event.obstacles)}; it looks again in {duration(event.retry_s)}"
    if isinstance(event, events.Ineligible):
        return f"may not train now: {_texts(event.obstacles)}"
    if isinstance(event, events.Finished):
        both = f"{size(event.bytes_up)} sent, {size(event.bytes_down)} received"
        return f"the task is finished ({both}); its adapter: {event.folder}"
    return ""


def encrypted_line(event: events.Encrypted) -> str:
    """What the user of an older version must know once."""
    return (
        f"this home was in the clear and is encrypted now ({event.files} files); its storage key: {event.key}; without "
        "it the home is lost. If others may have read this disk: emberlora edge rotate-key"
    )


def _texts(obstacles: tuple[Obstacle, ...]) -> str:
    return "; ".join(obstacle.text for obstacle in obstacles)


def size(count: float) -> str:
    """Bytes for people, in powers of 1,000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"
