"""Results: one training a line, appended to a file; and what is already there is not run again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from bench.errors import RequestError
from edge_runtime.bundle import Base
from edge_runtime.wire import Products

System = Literal[
    "peft",
    "emberlora-fp32",
    "emberlora-fp16",
    "emberlora-int8",
    "emberlora-int4",
    "emberlora-int8-fast",
    "emberlora-fp32-fast",
]
SYSTEMS: tuple[System, ...] = get_args(System)
REFERENCE: System = "peft"


def base_of(system: System) -> Base:
    """How the system's frozen weights are stored; peft's are whole, and it takes texts from the fp32 bundle."""
    for base in get_args(Base):
        if system.startswith(f"emberlora-{base}"):
            found: Base = base
            return found
    return "fp32"


def products_of(system: System) -> Products:
    """How the system multiplies with frozen weights while it trains; it is always measured exactly."""
    return "int8" if system.endswith("-fast") else "exact"


class Key(msgspec.Struct, frozen=True):
    """What tells one training from another."""

    task: str
    system: System
    seed: int
    steps: int
    quick: bool


class Line(msgspec.Struct, frozen=True):
    """One training.

    Attributes:
        task: clinc150 or gsm8k.
        system: Who trained.
        seed: Of the adapter at the start and of the order of the examples.
        steps: Optimizer steps.
        metric: "accuracy" from 0 to 1, or "loss" in nats a trained token; on held-out examples.
        curve: (steps taken, metric), from 0 steps on.
        final: The last metric of the curve.
        train_s: Seconds of training, measuring the metric not included.
        host: Processor, cores, threads, versions.
        commit: The checkout's, with + when it was changed.
        quick: A short run; its held-out examples are fewer.
    """

    task: str
    system: System
    seed: int
    steps: int
    metric: str
    curve: tuple[tuple[int, float], ...]
    final: float
    train_s: float
    host: dict[str, Any]
    commit: str
    quick: bool

    @property
    def key(self) -> Key:
        """What tells this training from another."""
        return Key(self.task, self.system, self.seed, self.steps, self.quick)


def read_lines(path: Path) -> list[Line]:
    """All lines, a later one in the place of an earlier one with the same key; none when there is no file.

    A last line without its end, left by a run that was killed, is not read.

    Raises:
        RequestError: a whole line is not a result.
    """
    if not path.exists():
        return []
    found: dict[Key, Line] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not text.endswith("\n"):
            break
        try:
            line = msgspec.json.decode(text, type=Line)
        except msgspec.DecodeError as error:
            raise RequestError(f"{path}: line {number}: not a result: {error}") from error
        found[line.key] = line
    return list(found.values())


class Row(msgspec.Struct, frozen=True):
    """A system's trainings of one task together.

    Attributes:
        system: Who trained.
        seeds: How many trainings.
        final: Mean of their last metrics.
        difference: Mean of final minus the reference's final of the same seed; None without a common seed.
        largest: The largest |difference| of one seed; None likewise.
        train_s: Mean seconds of training.
    """

    system: System
    seeds: int
    final: float
    difference: float | None
    largest: float | None
    train_s: float

    @property
    def apart(self) -> tuple[str, str]:
        """``difference`` and ``largest`` as a table has them."""
        if self.difference is None or self.largest is None:
            return "–", "–"
        return f"{self.difference:+.4f}", f"{self.largest:.4f}"


def rows_of(lines: Iterable[Line], task: str) -> list[Row]:
    """One row a system, in the order of :data:`SYSTEMS`; ``lines`` are all of the same number of steps."""
    mine: dict[System, dict[int, Line]] = {}
    for line in lines:
        if line.task == task:
            mine.setdefault(line.system, {})[line.seed] = line
    reference = mine.get(REFERENCE, {})
    return [_row(system, mine[system], reference) for system in SYSTEMS if system in mine]


def _row(system: System, runs: dict[int, Line], reference: dict[int, Line]) -> Row:
    apart = [runs[seed].final - reference[seed].final for seed in sorted(runs.keys() & reference.keys())]
    return Row(
        system,
        len(runs),
        float(np.mean([line.final for line in runs.values()])),
        float(np.mean(apart)) if apart else None,
        float(np.max(np.abs(apart))) if apart else None,
        float(np.mean([line.train_s for line in runs.values()])),
    )


def table(lines: Iterable[Line]) -> str:
    """A table for a terminal, a part for every task."""
    lines = list(lines)
    parts = []
    for task in dict.fromkeys(line.task for line in lines):
        metric = next(line.metric for line in lines if line.task == task)
        rows = [f"{task:<21}{'seeds':>6}{metric:>10}{'− peft':>10}{'largest':>10}{'train s':>10}"]
        for row in rows_of(lines, task):
            apart = "".join(f"{text:>10}" for text in row.apart)
            rows.append(f"{row.system:<21}{row.seeds:>6}{row.final:>10.4f}{apart}{row.train_s:>10.1f}")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)
