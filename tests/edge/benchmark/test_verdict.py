"""Which tier and which length are said to fit, from given figures."""

from __future__ import annotations

import pytest

from edge_runtime.benchmark.report import Length
from edge_runtime.benchmark.verdict import choose, longest, next_length
from tests.edge.benchmark.bench_reports import case

CASES = (
    case("full", ms=900, mb=800),
    case("full", ms=1200, mb=400, memory="recompute"),
    case("upper half", ms=500, mb=300),
    case("upper half", ms=700, mb=250, memory="recompute"),
    case("upper sixth", ms=300, mb=200),
)


@pytest.mark.parametrize(
    ("budget_mb", "number"),
    [(800, 0), (799, 1), (399, 2), (299, 3), (200, 4), (199, None)],
)
def test_the_highest_tier_that_fits_memory_with_its_fastest_setting(budget_mb: int, number: int | None) -> None:
    assert choose(CASES, rank=8, budget_mb=budget_mb) is (None if number is None else CASES[number])


def test_a_step_that_takes_too_long_does_not_fit() -> None:
    cases = (case("full", ms=6001, mb=1), case("upper half", ms=6000, mb=1))
    assert choose(cases, rank=8, budget_mb=10) is cases[1]


def test_only_the_bundles_own_rank_counts() -> None:
    assert choose(CASES, rank=16, budget_mb=1000) is None


def lengths(*found: tuple[int, float | None]) -> list[Length]:
    return [Length(tokens, peak) for tokens, peak in found]


@pytest.mark.parametrize(
    ("tried", "following"),
    [
        ((), 128),
        (((128, 90.0),), 256),
        (((128, 90.0), (256, 100.0)), 512),
        (((128, 90.0), (256, 100.0), (512, 140.0)), 1000),  # no further than the last
        (((128, 90.0), (256, 100.0), (512, 140.0), (1000, 150.0)), None),
        (((128, 90.0), (256, 501.0)), None),  # it does not fit any more
        (((128, None),), None),  # nor was it survived
        (((128, 100.0), (256, 262.5)), None),  # 262.5 + 4 * 162.5 = 912.5 is no risk to take
        (((128, 100.0), (256, 197.0)), 512),  # 585 is one: it is within half as much again
    ],
)
def test_lengths_double_while_it_is_safe(tried: tuple[tuple[int, float | None], ...], following: int | None) -> None:
    assert next_length(lengths(*tried), budget_mb=500, last=1000) == following


@pytest.mark.parametrize(
    ("tried", "found"),
    [
        (((128, 90.0), (256, 100.0), (512, 140.0)), (512, True)),  # the limit itself
        (((128, 501.0),), (None, True)),
        (((128, 100.0), (256, 900.0)), (192, False)),  # half of the way between them
        (((128, 100.0), (256, None)), (128, True)),
        (((64, 90.0),), (64, True)),
        (((64, 200.0), (128, 320.0)), (186, False)),  # 40 MiB each 64², and 180 left: sqrt(128² + 4.5 * 64²)
        (((64, 200.0), (128, 201.0)), (512, False)),  # not beyond four times what was tried, here the limit as well
        (((32, 200.0), (64, 200.0)), (256, False)),  # no growth seen: four times, not any length
    ],
)
def test_the_longest_length(tried: tuple[tuple[int, float | None], ...], found: tuple[int | None, bool]) -> None:
    assert longest(lengths(*tried), budget_mb=500, limit=512) == found
