"""What people and programs are shown: round figures, event lines, event JSON."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from cloud import events
from cloud.console import describe, json_reporter, size
from cloud.metrics import summarise
from cloud.store import UpdateRecord
from edge_runtime.wire import LocalMetrics, RoundStatus, UpdateReceipt

STATUS = RoundStatus(0, 2, 30, 0.7, 0.5, 0.8, 20, 2048, 1.5, "ab" * 32)
EVENTS: list[events.Event] = [
    events.ServerStarted("http://x", "t", "training", 3, 1),
    events.DatabaseMigrated(3, 4),
    events.DeviceEnrolled("a"),
    events.DeviceLeft("a"),
    events.UpdateCounted(0, "a", 1, 2, 10, 1500, 0.5, None),
    events.RequestRefused("PUT", "/p", "token", "detail"),
    events.DeadlineMoved(0, 1, 2, 5.0),
    events.RoundApplied(STATUS, 12),
    events.TaskFinished(12, 1, "ab", "data/published"),
    events.WorkFailed("round 0", "disk"),
    events.DeviceRevoked("a"),
    events.DeviceRekeyed("a"),
    events.PlanKeyChanged("ab" * 32, 3),
]


def record(device: str, weight: int, **metrics: object) -> UpdateRecord:
    return UpdateRecord(UpdateReceipt(device, 0, "d", weight), 100, 0.0, LocalMetrics(**metrics))  # type: ignore[arg-type]


def test_every_event_has_a_line_and_a_name() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(events.Event))
    lines: list[str] = []
    for event in EVENTS:
        assert "\n" not in describe(event)
        assert describe(event) != type(event).__name__
        json_reporter(lines.append)(event)
    decoded = [json.loads(line) for line in lines]
    assert len({row["event"] for row in decoded}) == len(EVENTS)
    assert decoded[4]["round"] == 0


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.50 GB")])
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_accuracy_is_over_all_evaluated_examples() -> None:
    updates = [
        record("a", 1, eval_examples=10, eval_correct=9, eval_loss=0.1, loss_start=1.0, loss_end=0.5),
        record("b", 3, eval_examples=30, eval_correct=9, eval_loss=0.5, loss_start=2.0),
    ]
    status = summarise(updates, task="classify", round_=4, seconds=2.0)
    assert (status.metric, status.eval_examples, status.loss_start, status.loss_end) == (18 / 40, 40, 1.75, 0.5)
    assert (status.round, status.devices, status.weight, status.bytes_up) == (4, 2, 4, 200)
    assert summarise(updates, task="lm", round_=0, seconds=0.0).metric == pytest.approx(0.4)


def test_nothing_measured_is_none() -> None:
    for task in ("classify", "lm"):
        status = summarise([record("a", 1)], task=task, round_=0, seconds=0.0)  # type: ignore[arg-type]
        assert (status.metric, status.loss_start, status.loss_end) == (None, None, None)
