"""Twenty scenarios of real processes that are killed with ``kill -9``, none of which breaks an invariant of
:mod:`tests.crash.ledger`; one of them for each point of :mod:`tests.crash.points`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.points import POINTS
from tests.crash.scenario import point_of, run

SEEDS = range(20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"{seed}-{point_of(seed).name}") for seed in SEEDS])
def test_nothing_is_lost_or_doubled_whoever_is_killed(crash_task: Path, tmp_path: Path, seed: int) -> None:
    """200 of them are run by ``make soak``."""
    scenario = run(crash_task, tmp_path / "task", seed)
    assert scenario.lives[scenario.place].killed >= 1


def test_the_seeds_have_every_point() -> None:
    assert {point_of(seed) for seed in SEEDS} == set(POINTS)
