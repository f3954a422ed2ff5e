"""What a person sees while the demo runs: one line a phase and a round, and below them a bar with the time left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cloud.demo.recipe import Recipe


@dataclass
class Live:
    """What is known of the rounds so far."""

    recipe: Recipe
    round: int = 0
    steps: int = 0  # done by all devices in all rounds
    losses: dict[str, float] = field(default_factory=dict)  # of each device's last batch, nats
    received: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    curve: list[float] = field(default_factory=list)

    def line(self) -> str:
        """Round, devices, bytes, loss and metric in one line; the metric is that of the last round's start."""
        loss = sum(self.losses.values()) / len(self.losses) if self.losses else None
        parts = [
            f"round {min(self.round + 1, self.recipe.rounds)}/{self.recipe.rounds}",
            f"{self.received}/{self.recipe.devices} updates",
            f"{megabytes(self.bytes_up)} up, {megabytes(self.bytes_down)} down",
            f"batch loss {'–' if loss is None else f'{loss:.3f}'}",
            f"{self.recipe.metric} {f'{self.curve[-1]:.3f}' if self.curve else '–'}",
        ]
        return " · ".join(parts)


class Show:
    """Phases and rounds on standard error, nothing when quiet."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.phase_s: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def phase(self, name: str, text: str) -> Iterator[None]:
        """Show that something goes on, and how long it took."""
        began = time.perf_counter()
        with self.console.status(text):
            yield
        self.phase_s[name] = round(time.perf_counter() - began, 2)
        self.say(f"✓ {text} ({self.phase_s[name]:.1f} s)")

    @contextlib.contextmanager
    def rounds(self, live: Live) -> Iterator[Progress]:
        """A bar over all optimizer steps of all devices."""
        columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        began = time.perf_counter()
        with Progress(TextColumn("{task.description}"), *columns, console=self.console, transient=True) as bar:
            bar.add_task(live.line(), total=live.recipe.all_steps)
            yield bar
        self.phase_s["rounds"] = round(time.perf_counter() - began, 2)
        self.say(f"✓ {live.recipe.rounds} rounds ({self.phase_s['rounds']:.1f} s)")


def megabytes(count: float) -> str:
    """Bytes as MB with one digit."""
    return f"{count / 1e6:.1f} MB"
