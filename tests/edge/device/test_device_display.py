"""What ``edge run --json`` prints, and what it leaves out for a journal."""

from __future__ import annotations

import json

import pytest

from edge_runtime.device.display import JsonDisplay
from edge_runtime.device.events import MeasuredPart, Noticed, StepDone


def printed(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, int]]:
    """Kind and step, or examples, of each line."""
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [(line["event"], line.get("step", line.get("examples", 0))) for line in lines]


def test_every_step_is_told_unless_fewer_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    display = JsonDisplay(clock=lambda: 0.0)
    for step in range(1, 5):
        display.show(StepDone(0, step, 4, 0.5))
    assert printed(capsys) == [("step", step) for step in range(1, 5)]


def test_a_journal_gets_a_step_a_minute_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    display = JsonDisplay(60.0, clock=lambda: now)
    for step in range(1, 11):
        display.show(StepDone(0, step, 10, 0.5))
        now += 25.0
    display.show(Noticed("a text was cut"))
    for examples in (3, 6, 9):
        display.show(MeasuredPart(1, examples, 9))
    assert printed(capsys) == [
        *(("step", step) for step in (1, 4, 7, 10)),
        ("notice", 0),
        ("measured", 9),
    ]
