"""Turns and tuning, with contestants that only count."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench.alive import parse_alive
from bench.display import Display
from bench.entries import Entry, Request, way
from bench.errors import UnavailableError
from bench.inside import Inside
from bench.race import STEPS, Race
from bench.shapes import MODELS
from bench.systems import VARIANTS, Setting, Setup, System


class FakeContestant:
    """Takes as long as its maker says; ``dies_after`` steps it ends."""

    def __init__(self, setup: Setup, ms: float, log: list[str], dies_after: int | None) -> None:
        self.setup, self.alive, self.times = setup, True, []
        self.inside: list[Inside] = []
        self.last = {"peak_private_mb": 1.23, "peak_total_mb": 4.56}
        self._ms, self._log, self._dies_after = ms, log, dies_after

    def __enter__(self) -> FakeContestant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.alive = False

    def run(self, steps: int) -> None:
        if self._dies_after is not None and len(self.times) >= self._dies_after:
            self.alive = False
            raise UnavailableError(f"{self.setup.system}: ended: no reason")
        self._log.append(self.setup.system)
        for _ in range(steps):  # of our own engine: half in the runtime in even steps, all but 1 ms in odd ones
            runtime_ms = self._ms / 2 if len(self.times) % 2 == 0 else self._ms - 1
            if self.setup.system.startswith("emberlora"):
                self.inside.append(Inside(runtime_ms, 0.25, 3.456))
            self.times.append(self._ms)

    @property
    def median_ms(self) -> float:
        return float(np.median(self.times))


class Stable:
    """Starts fakes: ``ms`` says how long a setup's step takes, None that it cannot be run."""

    def __init__(self, ms: Callable[[Setup], float | None], dies_after: dict[str, int] | None = None) -> None:
        self.log: list[str] = []
        self.started: list[Setup] = []
        self._ms, self._dies_after = ms, dies_after or {}

    def __call__(self, setup: Setup, folder: Path) -> Any:
        self.started.append(setup)
        ms = self._ms(setup)
        if ms is None:
            raise UnavailableError(f"{setup.system}: cannot")
        return FakeContestant(setup, ms, self.log, self._dies_after.get(setup.system))


def entry(tmp_path: Path, system: System, pattern: str = "1") -> Entry:
    (alive,) = parse_alive(pattern, MODELS["tiny"].modules)
    variant = VARIANTS.get(system, ("",))[0]
    paths = ("model", "bundle", "adapter")
    gradients = str(tmp_path / f"{system}.npz")
    setup = Setup(system, Setting(), variant, "tiny", *paths, 2, 16, alive.factors, 2, True, gradients)
    return Entry("tiny", alive, setup, "absent", tmp_path / "reference.npz")


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200)


def race(tmp_path: Path, console: Console, stable: Stable, **request: Any) -> Race:
    given = Request(tmp_path, ("torch-eager",), **request)
    display = Display(console, console.status(""))
    return Race(given, display, lambda: datetime(2026, 1, 2, tzinfo=timezone.utc), stable)


def test_turns_are_interleaved_and_begin_with_another_each_time(tmp_path: Path, console: Console) -> None:
    stable = Stable(lambda setup: 5.0)
    systems: tuple[System, ...] = ("emberlora-fp32", "torch-eager", "gemm-floor")
    measured = race(tmp_path, console, stable, tune=False, turns=2)
    lines = list(measured.lines([entry(tmp_path, system) for system in systems]))
    assert stable.log == [*systems, systems[1], systems[2], systems[0]]
    assert [line.system for line in lines] == list(systems)
    assert [line.steps for line in lines] == [2 * STEPS] * 3
    assert (lines[0].step_ms_median, lines[0].peak_private_mb, lines[0].when) == (5.0, 1.2, "2026-01-02T00:00:00+00:00")
    assert [line.setting for line in lines] == ["keep, mapped", "keep", "keep, mapped"]


def test_the_inside_of_a_step_is_told_where_it_is_known(tmp_path: Path, console: Console) -> None:
    """Medians over the same steps; what is left of each step is other, so that the three need not add up."""
    measured = race(tmp_path, console, Stable(lambda setup: 10.0), tune=False, turns=1)
    ours, theirs = measured.lines([entry(tmp_path, "emberlora-fp32"), entry(tmp_path, "torch-eager")])
    assert (ours.runtime_ms_median, ours.optimizer_ms_median, ours.other_ms_median, ours.kept_mb) == (
        7,
        0.25,
        2.75,
        3.46,
    )
    assert (theirs.runtime_ms_median, theirs.optimizer_ms_median, theirs.other_ms_median, theirs.kept_mb) == (None,) * 4


def test_what_cannot_be_run_is_said_once_and_the_others_go_on(tmp_path: Path, console: Console) -> None:
    stable = Stable(lambda setup: None if setup.system == "ort-training" else 5.0)
    measured = race(tmp_path, console, stable, tune=False, turns=1)
    entries = [entry(tmp_path, "ort-training"), entry(tmp_path, "ort-training", "B"), entry(tmp_path, "torch-eager")]
    assert [line.system for line in measured.lines(entries)] == ["torch-eager"]
    assert console.export_text().count("not run: ort-training: cannot") == 1


def test_one_that_ends_on_the_way_has_no_line(tmp_path: Path, console: Console) -> None:
    stable = Stable(lambda setup: 5.0, dies_after={"torch-eager": STEPS})
    measured = race(tmp_path, console, stable, tune=False, turns=3)
    lines = list(measured.lines([entry(tmp_path, "torch-eager"), entry(tmp_path, "gemm-floor")]))
    assert [(line.system, line.steps) for line in lines] == [("gemm-floor", 3 * STEPS)]
    assert "not run: torch-eager: ended: no reason" in console.export_text()


def test_the_best_way_of_a_peer_is_found_once_and_all_tried_are_told(tmp_path: Path, console: Console) -> None:
    """The second mode is faster with two threads, and faster still with one; a kill does not change the way."""
    speeds = {"default, 2 threads": 9.0, "max-autotune-no-cudagraphs, 2 threads": 8.0}
    speeds["max-autotune-no-cudagraphs, 1 thread"] = 7.0
    stable = Stable(lambda setup: speeds[way(setup)])
    measured = race(tmp_path, console, stable, turns=1)
    entries = [entry(tmp_path, "torch-compile"), entry(tmp_path, "torch-compile", "1/3")]
    lines = list(measured.lines(entries))
    assert [(line.variant, line.threads) for line in lines] == [("max-autotune-no-cudagraphs", 1)] * 2
    assert [line.tried for line in lines] == [speeds] * 2
    assert len(stable.started) == len(speeds) + 2
    assert stable.started[-1].factors == entries[1].setup.factors


def test_a_way_that_fails_is_left_out(tmp_path: Path, console: Console) -> None:
    stable = Stable(lambda setup: None if setup.variant.startswith("max") or setup.threads == 1 else 9.0)
    (line,) = race(tmp_path, console, stable, turns=1).lines([entry(tmp_path, "torch-compile")])
    assert (line.variant, line.threads, line.tried) == ("default", 2, {"default, 2 threads": 9.0})


def test_our_own_rows_are_not_tuned(tmp_path: Path, console: Console) -> None:
    stable = Stable(lambda setup: 5.0)
    (line,) = race(tmp_path, console, stable, turns=1).lines([entry(tmp_path, "emberlora-fp32")])
    assert line.tried == {}
    assert len(stable.started) == 1


def test_the_reference_is_made_once(tmp_path: Path, console: Console) -> None:
    stable = Stable(lambda setup: 5.0)
    measured = race(tmp_path, console, stable)
    asked = entry(tmp_path, "torch-eager")
    measured.make_reference(asked)
    np.savez(asked.reference)
    measured.make_reference(asked)
    assert len(stable.started) == 1
