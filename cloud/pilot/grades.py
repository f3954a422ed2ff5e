"""How well a device suits the task, as a letter: A has room to spare, B does, C holds the others up.

Each of four shares is held against two limits; a device has the worst of its letters, as one thing that fails is
enough to fail a round.

========  =====================================================================  =====  =====
share     of what                                                                A to   B to
========  =====================================================================  =====  =====
memory    peak private memory of training, of the memory that was free before     0.75   0.90
time      from a round's opening to the device's update (90th percentile), of      0.50   1.00
          the round's deadline
link      moving a round's bytes at the measured speeds, of the deadline           0.10   0.25
refused   updates refused or too late, of all it sent                              0.05   0.25
========  =====================================================================  =====  =====

Memory: the engine plans with 60 % of what is free; the rest up to three quarters is the optimizer's and temporaries,
and beyond nine tenths a browser that is opened ends the training. Time: half a deadline leaves room for a day on
which the device is twice as busy. Link: a tenth is lost in the noise of training, a quarter is what the suggestion
lets a round's transfers take at most.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Grade = Literal["A", "B", "C", "–"]
LIMITS: dict[str, tuple[float, float]] = {
    "memory": (0.75, 0.90),
    "time": (0.50, 1.00),
    "link": (0.10, 0.25),
    "refused": (0.05, 0.25),
}


class Shares(msgspec.Struct, frozen=True):
    """What a grade is made from, each 0 or more; None: not measured."""

    memory: float | None
    time: float | None
    link: float | None
    refused: float | None


class Grades(msgspec.Struct, frozen=True):
    """The letter of each share, and the worst of them; "–": not measured, and overall if nothing was."""

    memory: Grade
    time: Grade
    link: Grade
    refused: Grade
    overall: Grade


def grade(share: float | None, limits: tuple[float, float]) -> Grade:
    """The letter of a share; a limit belongs to the better letter."""
    if share is None:
        return "–"
    best, good = limits
    return "A" if share <= best else "B" if share <= good else "C"


def grade_device(shares: Shares, *, counted: int) -> Grades:
    """The letters of a device of which so many updates counted; one that never got that far has a C."""
    letters = {name: grade(getattr(shares, name), limits) for name, limits in LIMITS.items()}
    known = [letter for letter in letters.values() if letter != "–"]
    worst: Grade = max(known, default="–") if counted else "C"
    return Grades(**letters, overall=worst)
