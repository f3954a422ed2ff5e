"""The rule for outliers alone: its limits, what it cannot know, and that the order of arrival is no part of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cloud_tiers import elements, rounds, summed

from cloud.aggregate import Imprint, Part, Sketcher
from cloud.aggregate.sketch import WIDTH
from cloud.config import parse_config
from cloud.errors import ConfigError
from cloud.outliers import Outliers, Verdict, judge
from edge_runtime.wire import Layout, LocalMetrics, Update

RULE = Outliers(enabled=True, norm_factor=10.0, min_cosine=-0.1, min_devices=4)
SECRET = bytes(range(32))


def imprint(norm: float, direction: Sequence[float], *, tier: int = 0, tiers: int = 1) -> Imprint:
    """Of an update whose sketch begins with this direction; the same in all parts."""
    sketch = np.zeros(WIDTH, np.float32)
    sketch[: len(direction)] = direction
    return Imprint(tier, (Part(norm, sketch),) * (tiers - tier))


def fleet(*norms: float) -> dict[str, Imprint]:
    """Devices that all point the same way."""
    return {f"d{number:02d}": imprint(norm, [1.0]) for number, norm in enumerate(norms)}


def named(verdict: Verdict) -> list[tuple[str, str, bool]]:
    return [(outlier.device, outlier.rule, outlier.kept) for outlier in verdict.outliers]


# Norm


def test_a_norm_beyond_the_factor_is_an_outlier_and_one_at_it_is_none() -> None:
    within = judge(fleet(1.0, 1.0, 1.0, 1.0, 10.0), RULE, least=1)
    assert within == Verdict(5, ())
    beyond = judge(fleet(1.0, 1.0, 1.0, 1.0, math.nextafter(10.0, 11.0)), RULE, least=1)
    assert named(beyond) == [("d04", "norm", False)]


def test_what_is_measured_is_said() -> None:
    (outlier,) = judge(fleet(2.0, 2.0, 2.0, 2.0, 2.0, 196.4), RULE, least=1).outliers
    assert (outlier.measured, outlier.bound, outlier.devices, outlier.tier) == (98.2, 10.0, 6, 0)
    huge = judge(fleet(1e-40, 1e-40, 1e-40, 1e-40, 1e40), RULE, least=1)
    assert huge.outliers[0].measured == 1e9


def test_all_equal_and_small_ones_are_no_outliers() -> None:
    assert judge(fleet(*[3.0] * 9), RULE, least=1) == Verdict(9, ())
    assert judge(fleet(3.0, 3.0, 3.0, 3.0, 1e-9), RULE, least=1) == Verdict(5, ())


def test_those_that_moved_nothing_are_neither_judged_nor_the_median() -> None:
    assert judge(fleet(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0), RULE, least=1) == Verdict(0, ())
    assert judge(fleet(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0), RULE, least=1) == Verdict(4, ())
    assert judge(fleet(*[0.0] * 9), RULE, least=1) == Verdict(0, ())


def test_of_few_devices_nobody_is_judged() -> None:
    assert judge(fleet(1.0, 1.0, 1000.0), RULE, least=1) == Verdict(0, ())
    assert judge({}, RULE, least=1) == Verdict(0, ())
    assert judge(fleet(1.0, 1.0, 1.0, 1000.0), RULE, least=1).judged == 4


# Direction


def pointing(*angles: float) -> dict[str, Imprint]:
    """Devices of norm 1 at these angles in a plane, in degrees."""
    radians = [math.radians(angle) for angle in angles]
    return {f"d{n:02d}": imprint(1.0, [math.cos(r), math.sin(r)]) for n, r in enumerate(radians)}


def test_who_points_away_from_the_others_is_an_outlier() -> None:
    """The others' mean direction is that of the first axis; one is compared without itself."""
    bound = math.degrees(math.acos(RULE.min_cosine))
    within = judge(pointing(0, 0, 20, -20, bound - 0.1), RULE, least=1)
    assert within == Verdict(5, ())
    beyond = judge(pointing(0, 0, 20, -20, bound + 0.1), RULE, least=1)
    assert named(beyond) == [("d04", "direction", False)]
    (opposite,) = judge(pointing(0, 0, 20, -20, 180), RULE, least=1).outliers
    assert (opposite.measured, opposite.bound, opposite.devices) == (-1.0, -0.1, 5)


def test_devices_that_learn_unrelated_things_are_no_outliers() -> None:
    devices = {f"d{n}": imprint(1.0, np.eye(12)[n]) for n in range(12)}
    assert judge(devices, RULE, least=1) == Verdict(12, ())


def test_directions_that_cancel_point_nowhere() -> None:
    """Of the two on the second axis the others' sum is opposite; of those on the first it is zero, but for them."""
    verdict = judge(pointing(0, 90, 180, 270), RULE, least=1)
    assert {outlier.measured for outlier in verdict.outliers} == {-1.0}
    assert len(named(verdict)) == 4
    assert [kept for *_, kept in named(verdict)] == [False, True, True, True]
    one = {**pointing(0, 0, 180, 180), "zero": imprint(1.0, [0.0, 0.0])}
    assert "zero" not in {outlier.device for outlier in judge(one, RULE, least=1).outliers}


def test_who_is_too_large_has_no_vote_on_directions() -> None:
    """Else it could make an honest device look opposed, as one of the usual norm does here."""
    devices = {**pointing(0, 92, 10, 0, 0), "large": imprint(1000.0, [0.0, -1.0])}
    assert named(judge(devices, RULE, least=1)) == [("large", "norm", False)]
    devices["large"] = imprint(1.0, [0.0, -1.0])
    assert ("d01", "direction", False) in named(judge(devices, RULE, least=1))


def test_weight_and_norm_give_no_more_of_a_vote() -> None:
    devices = {**pointing(0, 0, 0, 0), "long": imprint(9.9, [-1.0])}
    assert named(judge(devices, RULE, least=1)) == [("long", "direction", False)]


def test_minus_one_turns_directions_off() -> None:
    rule = msgspec.structs.replace(RULE, min_cosine=-1.0)
    assert judge(pointing(0, 0, 0, 0, 180), rule, least=1) == Verdict(5, ())


# Who stays


def test_those_that_are_least_beyond_the_rule_stay_where_too_few_would() -> None:
    norms = fleet(1.0, 1.0, 1.0, 1.0, 50.0, 20.0, 90.0)
    assert named(judge(norms, RULE, least=5)) == [
        ("d06", "norm", False),
        ("d04", "norm", False),
        ("d05", "norm", True),
    ]
    verdict = judge(norms, RULE, least=7)
    assert verdict.aside == frozenset()
    assert [outlier.kept for outlier in verdict.outliers] == [True] * 3


def test_equally_bad_ones_go_by_name() -> None:
    verdict = judge(fleet(1.0, 50.0, 1.0, 50.0, 1.0, 50.0, 1.0), RULE, least=5)
    assert named(verdict) == [("d01", "norm", False), ("d03", "norm", False), ("d05", "norm", True)]


def test_a_large_one_goes_before_an_opposed_one() -> None:
    devices = {**pointing(0, 0, 0, 0, 180), "large": imprint(11.0, [1.0])}
    assert named(judge(devices, RULE, least=5)) == [("large", "norm", False), ("d04", "direction", True)]


def test_more_than_half_always_stay() -> None:
    """Two halves that oppose each other: nobody can say which is right."""
    verdict = judge(pointing(*[0] * 5, *[180] * 5), RULE, least=1)
    assert len(verdict.aside) <= 4


# Tiers


def test_a_tier_of_its_own_is_no_hiding_place() -> None:
    """In what the weakest tier carries all are compared; in what only the strong ones do, these."""
    strong = {f"s{n}": imprint(1.0, [1.0], tiers=3) for n in range(5)}
    alone = imprint(1.0, [-1.0], tier=2, tiers=3)
    verdict = judge({**strong, "weak": alone}, RULE, least=1)
    (outlier,) = verdict.outliers
    assert (outlier.device, outlier.tier, outlier.devices) == ("weak", 2, 6)
    hidden = Imprint(0, (Part(40.0, imprint(1.0, [1.0]).parts[0].sketch), *imprint(1.0, [1.0], tiers=2).parts))
    (outlier,) = judge({**strong, "strong": hidden}, RULE, least=1).outliers
    assert (outlier.device, outlier.rule, outlier.tier, outlier.devices) == ("strong", "norm", 0, 6)


def test_few_of_a_tier_are_judged_in_what_all_carry() -> None:
    devices = {f"s{n}": imprint(1.0 + 99 * (n == 1), [1.0], tiers=2) for n in range(2)}
    devices |= {f"w{n}": imprint(1.0, [1.0], tier=1, tiers=2) for n in range(4)}
    (outlier,) = judge(devices, RULE, least=1).outliers
    assert (outlier.device, outlier.tier, outlier.devices) == ("s1", 1, 6)


# Order


@st.composite
def imprints(draw: st.DrawFn) -> dict[str, Imprint]:
    found = {}
    for number in range(draw(st.integers(0, 12))):
        tier = draw(st.integers(0, 1))
        norm = draw(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 30.0, 1e-30]))
        direction = draw(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3))
        found[f"d{number:02d}"] = imprint(norm, direction if norm else [0.0], tier=tier, tiers=2)
    return found


@given(imprints(), st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_verdict_does_not_depend_on_the_order(found: dict[str, Imprint], least: int, random: Any) -> None:
    """And whatever comes: enough stay, and every figure is a number on its side of the bound."""
    verdict = judge(found, RULE, least=least)
    names = list(found)
    random.shuffle(names)
    assert judge({name: found[name] for name in names}, RULE, least=least) == verdict
    stay = len(found) - len(verdict.aside)
    assert stay >= min(max(least, len(found) // 2 + 1), len(found))
    assert len({outlier.device for outlier in verdict.outliers}) == len(verdict.outliers)
    for outlier in verdict.outliers:
        beyond = outlier.measured - outlier.bound
        assert beyond >= 0 if outlier.rule == "norm" else beyond <= 0
        assert math.isfinite(outlier.measured)


@given(imprints(), st.floats(1e-6, 1e6))
def test_the_verdict_does_not_depend_on_the_scale(found: dict[str, Imprint], scale: float) -> None:
    scaled = {
        name: Imprint(one.tier, tuple(Part(scale * part.norm, part.sketch) for part in one.parts))
        for name, one in found.items()
    }
    assert named(judge(scaled, RULE, least=1)) == named(judge(found, RULE, least=1))


# Sketches


def layout(count: int) -> Layout:
    return Layout((("m.lora_b", (count,)),))


def unit(vector: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return vector.astype(np.float64) / np.linalg.norm(vector.astype(np.float64))


def test_a_sketch_keeps_angles() -> None:
    """Random updates of 200,000 values at known angles: all cosines within five standard errors."""
    rng = np.random.default_rng(5)
    common = rng.normal(size=200_000)
    updates = [(share * common + rng.normal(size=200_000)).astype(np.float32) for share in (0.0, 0.3, 1.0, -1.0, 3.0)]
    sketcher = Sketcher([layout(200_000)], SECRET)
    parts = [sketcher.imprint(Update(values, 1)).parts[0] for values in updates]
    for one, part in zip(updates, parts, strict=True):
        assert part.norm == pytest.approx(np.linalg.norm(one.astype(np.float64)))
        for other, theirs in zip(updates, parts, strict=True):
            error = unit(part.sketch) @ unit(theirs.sketch) - unit(one) @ unit(other)
            assert abs(error) < 5 / math.sqrt(WIDTH)


def test_the_draw_follows_from_the_secret() -> None:
    """The same for the same key, another for another: no device can know what its sketch will not show."""
    update = Update(np.random.default_rng(1).normal(size=5000).astype(np.float32), 1)
    first, again = (Sketcher([layout(5000)], SECRET).imprint(update).parts[0].sketch for _ in range(2))
    assert np.array_equal(first, again)
    other = Sketcher([layout(5000)], bytes(32)).imprint(update).parts[0].sketch
    assert abs(unit(first) @ unit(other)) < 5 / math.sqrt(WIDTH)


@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e38])
def test_any_finite_update_has_a_sketch(scale: float) -> None:
    update = Update(np.full(3, scale, np.float32), 1)
    part = Sketcher([layout(3)], SECRET).imprint(update).parts[0]
    assert part.norm == pytest.approx(scale * math.sqrt(3), rel=1e-6)
    assert np.isfinite(part.sketch).all()


def test_an_update_of_zeros_points_nowhere() -> None:
    part = Sketcher([layout(70_000)], SECRET).imprint(Update(np.zeros(70_000, np.float32), 1)).parts[0]
    assert part.norm == 0.0
    assert not part.sketch.any()


@given(rounds())
def test_what_a_weaker_tier_carries_is_compared_with_its_updates(drawn: Any) -> None:
    """A strong update and the weak one of the same values have the same imprint where they have the same parts."""
    layouts, updates = drawn
    sketcher = Sketcher(layouts, SECRET)
    for update in updates:
        mine = elements(layouts[update.metrics.tier], update.values)
        found = sketcher.imprint(update)
        assert len(found.parts) == len(layouts) - update.metrics.tier
        for tier in range(update.metrics.tier, len(layouts)):
            places = elements(layouts[tier], np.zeros(layouts[tier].count, np.float32))
            values = np.array([mine[place] for place in places], np.float32)
            weak = sketcher.imprint(Update(values, 1, LocalMetrics(tier=tier))).parts[0]
            part = found.parts[tier - update.metrics.tier]
            assert part.norm == weak.norm
            assert np.array_equal(part.sketch, weak.sketch)


# The sum of the others


@given(rounds(), st.randoms(use_true_random=False))
def test_what_is_taken_out_was_never_there(drawn: Any, random: Any) -> None:
    layouts, updates = drawn
    gone = [update for update in updates if random.random() < 0.4]
    kept = [update for update in updates if not any(update is one for one in gone)]
    total, expected = summed(layouts, updates), summed(layouts, kept)
    before = total.mean()
    rest = total.without(gone)
    assert np.array_equal(rest.mean(), expected.mean())
    assert np.array_equal(rest.sums(), expected.sums())
    assert (rest.devices, rest.weight, rest.idle()) == (expected.devices, expected.weight, expected.idle())
    assert np.array_equal(total.mean(), before)


def test_more_than_was_added_cannot_be_taken_out() -> None:
    layouts = (layout(2), Layout((("m.lora_b", (1,)),), tier=1))
    total = summed(layouts, [Update(np.ones(2, np.float32), 5)])
    for weight, tier, message in ((9, 0, "take away more"), (1, 1, "no update of tier 1")):
        with pytest.raises(ValueError, match=message):
            total.without([Update(np.ones(2 - tier, np.float32), weight, LocalMetrics(tier=tier))])
    assert (total.devices, total.weight) == (1, 5)


# Config

BASE = '[task]\nname = "t"\nbundle = "b"\ndevices_per_round = 20\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("norm_factor = 1.0", "outliers.norm_factor: expected more than 1, the median itself, got 1.0"),
        ("norm_factor = nan", "outliers.norm_factor"),
        ("min_cosine = 0.0", "outliers.min_cosine: expected from -1 to less than 0"),
        ("min_cosine = -1.1", "outliers.min_cosine"),
        ("min_cosine = nan", "outliers.min_cosine"),
        ("min_devices = 3", "outliers.min_devices: expected at least 4, got 3"),
        ("min_devices = 21", r"outliers.min_devices \(21\) must not exceed task.devices_per_round \(20\)"),
        ("min_device = 8", "unknown field `min_device`"),
    ],
)
def test_a_wrong_rule_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(f"{BASE}[outliers]\nenabled = true\n{text}\n".encode(), path=Path("e.toml"))


def test_a_rule_that_could_set_nobody_aside_is_named() -> None:
    with pytest.raises(ConfigError, match=r"outliers.enabled needs task.min_devices below task.devices_per_round"):
        parse_config(f"{BASE}min_devices = 20\n[outliers]\nenabled = true\n".encode(), path=Path("e.toml"))


@pytest.mark.parametrize("value", ["0.0", "-1.0", "nan", "inf"])
def test_a_wrong_bound_of_the_norm_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.max_update_norm: expected more than 0"):
        parse_config(f"{BASE}max_update_norm = {value}\n".encode(), path=Path("e.toml"))
