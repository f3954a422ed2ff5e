"""Tiers: every component has exactly the mean of the devices that sent it, and what too few sent stays as it is.

The oracle is one ``np.average`` over the devices that carried an element, found by the element's name and number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
from cloud_fleet import Device, Site, make_bundle, values_for
from hypothesis import given
from hypothesis import strategies as st
from test_cloud_replay import replay

from cloud.aggregate import RoundSum, apply_mean
from cloud.config import parse_config
from cloud.console import describe
from cloud.errors import ConfigError
from cloud.events import RoundApplied
from cloud.planner import Annealing, PastRound, Situation, Tiers, Traffic, choose, plan_tiers
from cloud.planner.costs import plan_bytes
from cloud.planner.scores import component_scores, scores
from cloud.planning import plan_layouts
from edge_runtime.bundle import Array, Bundle, parse_tensors
from edge_runtime.wire import (
    Layout,
    LocalMetrics,
    ModulePlan,
    Plan,
    Tier,
    Update,
    UpdateRules,
    tier_layouts,
)

RULES = UpdateRules()
FEATURES = {"l.0.q": (3, 2), "l.1.q": (2, 4), "l.2.q": (5, 3)}
PLACES = {name: number for number, name in enumerate(FEATURES)}
HEAD = {"classifier.weight": (2, 3), "classifier.bias": (2,)}
TIERS = {"enabled": True, "blocks": [0.5, 0.5], "max_rank": [3, 1]}  # of two blocks; max_rank 3 bounds nothing


def layouts_of(modules: tuple[ModulePlan, ...], tiers: tuple[Tier, ...]) -> tuple[Layout, ...]:
    plan = Plan(1, "t", 0, 1, "train", "", "", 0, modules, True, None, None, 0, 0.0, tiers=tiers)  # type: ignore[arg-type]
    return tier_layouts(plan, features=FEATURES, places=PLACES, head=HEAD)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[tuple[Layout, ...], list[Update]]:
    """A plan of three modules with tiers, and updates to it."""
    modules = []
    for name in FEATURES:
        rank = draw(st.integers(1, 5))
        listed = (
            draw(st.lists(st.integers(0, rank - 1), unique=True, max_size=rank - 1).map(sorted)) if rank > 1 else []
        )
        alive = draw(st.sampled_from(["", "A", "B", "AB"]))
        modules.append(ModulePlan(name, rank, alive, tuple(listed) if listed and alive else msgspec.UNSET))
    lowest = sorted(draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
    ranks = sorted((draw(st.integers(1, 6)) for _ in lowest), reverse=True)
    layouts = layouts_of(tuple(modules), tuple(Tier(b, max_rank=r) for b, r in zip(lowest, ranks, strict=True)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tiers = draw(st.lists(st.integers(0, len(lowest)), max_size=8))
    updates = [
        Update(
            rng.uniform(-8, 8, size=layouts[tier].count).astype(np.float32),
            int(rng.integers(1, 100_000)),
            LocalMetrics(tier=tier),
        )
        for tier in tiers
    ]
    return layouts, updates


def elements(layout: Layout, values: Array) -> dict[tuple[str, tuple[int, ...]], float]:
    """Every value by tensor and place in the whole tensor."""
    found = {}
    for name, part in layout.split(values).items():
        listed = layout.components.get(name)
        for place, value in np.ndenumerate(part):
            where = list(place)
            if listed is not None:
                axis = 1 if name.endswith("_b") else 0
                where[axis] = listed[where[axis]]
            found[name, tuple(where)] = float(value)
    return found


def summed(layouts: tuple[Layout, ...], updates: list[Update]) -> RoundSum:
    total = RoundSum(layouts, RULES)
    for update in updates:
        total.add(update)
    return total


@given(rounds(), st.randoms(use_true_random=False))
def test_every_element_has_the_mean_of_those_that_sent_it(drawn: Any, random: Any) -> None:
    """Whatever the order; an element that fewer than two sent does not move, and its component is named."""
    layouts, updates = drawn
    total = summed(layouts, updates)
    sent = [(elements(layouts[u.metrics.tier], u.values), min(u.weight, RULES.weight_cap)) for u in updates]
    idle: dict[str, set[int]] = {}
    for (name, place), value in elements(layouts[0], total.mean()).items():
        known = [(found[name, place], weight) for found, weight in sent if (name, place) in found]
        if len(known) < 2:
            assert value == 0.0
            if ".lora_" in name:
                module, _, factor = name.partition(".lora_")
                idle.setdefault(module, set()).add(place[factor == "b"])
        else:
            values, weights = zip(*known, strict=True)
            assert value == pytest.approx(np.average(values, weights=weights), abs=2**-33 + 1e-12)
    assert total.idle() == {module: tuple(sorted(numbers)) for module, numbers in idle.items()}
    assert (total.devices, total.weight) == (len(sent), sum(weight for _, weight in sent))
    shuffled = list(updates)
    random.shuffle(shuffled)
    assert np.array_equal(summed(layouts, shuffled).mean(), total.mean())


@given(rounds())
def test_a_plan_without_tiers_moves_by_one_device(drawn: Any) -> None:
    layouts, updates = drawn
    alone = [update for update in updates if update.metrics.tier == 0][:1]
    total = summed(layouts[:1], alone)
    assert total.idle() == {} or not alone
    if alone:
        np.testing.assert_allclose(total.mean(), alone[0].values, atol=2**-33)


def test_room_is_for_all_tiers_together() -> None:
    layouts = layouts_of((ModulePlan("l.0.q", 2, "B"),), (Tier(1),))
    total = RoundSum(layouts, UpdateRules(max_devices=2))
    for tier in (0, 1):
        total.add(Update(np.ones(layouts[tier].count, np.float32), 1, LocalMetrics(tier=tier)))
    before = total.mean()
    with pytest.raises(ValueError, match="room for 2 devices, got 3"):
        total.add(Update(np.ones(layouts[1].count, np.float32), 1, LocalMetrics(tier=1)))
    assert (total.devices, total.mean().tolist()) == (2, before.tolist())


# Plans


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("tiers") / "bundle", r_max=3)


def modules_of(bundle: Bundle, *alive: int) -> list[ModulePlan]:
    """Alive in these blocks."""
    return [ModulePlan(m.name, 3, "B" if m.block in alive else "") for m in bundle.manifest.modules]


def test_a_tier_has_its_share_of_the_last_blocks(bundle: Bundle) -> None:
    settings = Tiers(enabled=True, blocks=(1.0, 0.5, 0.1), max_rank=(3, 2, 2), memory_mib=(), step_s=(1.0, 2.0, 3.0))
    assert plan_tiers(settings, bundle.manifest, modules_of(bundle, 0, 1)) == (
        Tier(0, 3, step_s=1.0),
        Tier(1, 2, step_s=2.0),
        Tier(1, 2, step_s=3.0),
    )


def test_every_tier_carries_the_uppermost_living_block(bundle: Bundle) -> None:
    """Else a fleet of weak devices would have nothing to send, and the round would never close."""
    found = plan_tiers(Tiers(enabled=True), bundle.manifest, modules_of(bundle, 0))
    assert [tier.lowest_block for tier in found or ()] == [0, 0]


def test_without_the_table_plans_have_no_tiers(bundle: Bundle) -> None:
    assert plan_tiers(Tiers(), bundle.manifest, modules_of(bundle, 0, 1)) is msgspec.UNSET


BASE = '[task]\nname = "t"\nbundle = "b"\n'
ON = "[tiers]\nenabled = true\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + 'aggregation = "stack"\n' + ON, "tiers.enabled needs task.aggregation alternate, b-only or both"),
        (BASE + "min_devices = 1\n" + ON, "tiers.enabled needs task.min_devices of at least 2, got 1"),
        (BASE + ON + "blocks = []", "tiers.blocks: expected 1 to 16 shares"),
        (BASE + ON + "blocks = [0.5]", "tiers.memory_mib: expected 1 values, as many as tiers.blocks, or none, got 2"),
        (BASE + ON + "blocks = [0.5, 0.0]", "tiers.blocks: expected more than 0 and at most 1, got 0.5, 0"),
        (BASE + ON + "blocks = [0.2, 0.5]", "tiers.blocks must not rise from one tier to the next: got 0.2, 0.5"),
        (BASE + ON + "max_rank = [1, 2]", "tiers.max_rank must not rise"),
        (BASE + ON + "max_rank = [2, 0]", "tiers.max_rank: expected more than 0"),
        (BASE + ON + "step_s = [2.0, 1.0]", "tiers.step_s must not fall"),
        (BASE + ON + "step_s = [2.0, inf]", "tiers.step_s: expected more than 0"),
        (BASE + "[tiers]\nblock = 1", "unknown field `block`"),
    ],
)
def test_wrong_tiers_are_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(text.encode(), path=Path("emberlora.toml"))
    assert "\n" not in str(caught.value)


# What policies make of it


def test_what_nobody_carried_begins_anew_and_is_not_judged(bundle: Bundle) -> None:
    """A module whose B too few devices sent trains B again; the others go on to A. Nor does it count as still."""
    names = bundle.manifest.module_names
    modules = tuple(ModulePlan(name, 2, "B") for name in names)
    moved = dict.fromkeys(names[1:], 0.5)
    idle = {names[0]: (0, 1), names[1]: (1,)}
    past = (PastRound(modules, {names[0]: 0.0, **moved}, idle=idle),)
    situation = Situation(bundle.manifest, dict.fromkeys(names, 2), "alternate", 1, 4, 0, past=past)
    assert [situation.factor(name) for name in names] == ["B", "A", "A", "A"]
    found = scores(past, dict.fromkeys(names, 1))
    assert names[0] not in found
    assert found[names[1]] == pytest.approx(2 * found[names[2]])  # the same from half of its components


def test_what_came_late_does_not_break_the_first_budget(bundle: Bundle) -> None:
    """All but one were carried for the first time in the last initiating round: they are in the middle of their cycles,
    and yet no more may live than the budget allows."""
    names = bundle.manifest.module_names
    modules = tuple(ModulePlan(name, 2, "B") for name in names)
    moved = dict.fromkeys(names, 1.0)
    past = (PastRound(modules, moved, idle=dict.fromkeys(names[1:], (0, 1))), PastRound(modules, moved))
    settings = Annealing(budget_start=1.0, budget_end=0.3, initiating_rounds=2)
    situation = Situation(
        bundle.manifest, dict.fromkeys(names, 2), "alternate", 2, 9, 0, settings, full_rank=2, past=past
    )
    alive = [module.name for module in choose("kill-revive", situation).modules if module.alive]
    spent = 2 * sum(situation.component_sizes[name] for name in alive)
    assert 0 < spent <= 0.3 * situation.full_parameters


def test_tiers_are_counted_in_the_bytes_of_a_plan(bundle: Bundle) -> None:
    modules = modules_of(bundle, 0, 1)
    settings = Tiers(enabled=True, max_rank=(2, 1))
    with_tiers, without = (
        plan_bytes(Traffic(bundle.manifest, "tiny", "both", 3, True, 32, 32, tiers), modules)
        for tiers in (settings, Tiers())
    )
    text = msgspec.json.encode({"tiers": plan_tiers(settings, bundle.manifest, modules)})
    assert with_tiers - without == len(text) - 2 + 1  # without its braces, with a comma


def test_components_that_nobody_carried_are_not_judged() -> None:
    past = (PastRound((ModulePlan("m", 3, "B"),), {"m": 1.0}, {"m": (1.0, 1.0, 0.0)}, idle={"m": (2,)}),)
    assert component_scores(past, {"m": 3}) == {("m", 0): 1.0, ("m", 1): 1.0}


# A task


async def fleet(site: Site, session: aiohttp.ClientSession, count: int) -> list[Device]:
    await site.start()
    return [await site.device(session, f"device-{number}") for number in range(count)]


def changes_of(site: Site, signed: Any, tier: int, seed: int) -> Array:
    """Random, and where the plan quantises of whole codes."""
    values = values_for(site, signed, seed, tier=tier)
    layout = plan_layouts(site.bundle, signed.plan)[tier]
    if layout.quantisation is None:
        return values
    rng = np.random.default_rng(seed)
    return np.concatenate(
        [
            (rng.integers(-127, 128, size=size) * step).astype(np.float32)
            for size, step in zip(layout.sizes, layout.quantisation.steps, strict=True)
        ]
    )


@pytest.mark.parametrize("upload", ["float32", "int8"])
@pytest.mark.parametrize("aggregation", ["alternate", "both", "b-only"])
async def test_rounds_of_a_mixed_fleet_are_exact_and_replayed(
    tmp_path: Path, session: aiohttp.ClientSession, aggregation: str, upload: str
) -> None:
    """Two strong devices and two weaker ones; in the third round one strong device is away, and what it alone carries
    stays. A restart in the middle of a round changes nothing."""
    bundle = make_bundle(tmp_path / "bundle", r_max=3)
    site = Site.make(
        tmp_path,
        bundle=bundle,
        rounds=4,
        devices_per_round=4,
        min_devices=2,
        aggregation=aggregation,
        upload=upload,
        tiers=TIERS,
    )
    devices = await fleet(site, session, 4)
    signed = await devices[0].plan()
    alive = []
    while signed.plan.state == "train":
        alive.append([module.alive for module in signed.plan.modules])
        round_ = signed.plan.round
        layouts = plan_layouts(bundle, signed.plan)
        adapter = parse_tensors((await devices[0].blob(signed.plan.adapter)).body, what="adapter")
        sent = []
        for number, tier in [(0, 0), (1, 1), (2, 2)] + [(3, 0)] * (round_ != 2):
            device, weight = devices[number], 10 + number
            values = changes_of(site, signed, tier, 10 * round_ + number)
            frame = device.frame(signed, values, weight=weight, tier=tier)
            assert (await device.put(signed, device.seal(signed, frame))).status == 201
            sent.append((elements(layouts[tier], values), weight))
            if (round_, number) == (1, 1):
                await site.restart()
        if round_ == 2:
            site.clock.now = signed.plan.deadline + 1
            await site.tick()
        signed = await devices[0].plan(after=round_)
        moved = parse_tensors((await devices[0].blob(signed.plan.adapter)).body, what="adapter")
        still = 0
        for name, before in adapter.items():
            for place, value in np.ndenumerate(before):
                known = [(found[name, place], weight) for found, weight in sent if (name, place) in found]
                if len(known) < 2:
                    still += any((name, place) in found for found, _ in sent)
                    assert moved[name][place] == value
                else:
                    values, weights = zip(*known, strict=True)
                    exact = np.float32(float(value) + np.average(values, weights=weights))
                    assert moved[name][place] == pytest.approx(exact, rel=1e-6, abs=1e-9)
        assert (still > 0) == (round_ == 2)
    status = await site.operator.status()
    assert [entry.idle for entry in status.history] == [{}, {}, {f"layer.0.{s}": (0, 1, 2) for s in "qv"}, {}]
    assert [(device.name, device.tier, device.updates) for device in status.devices] == [
        ("device-0", 0, 4),
        ("device-1", 1, 4),
        ("device-2", 2, 4),
        ("device-3", 0, 3),
    ]
    loads = [device.bytes_up for device in status.devices]
    assert loads[0] > loads[1] > loads[2]
    assert alive[3] == {"alternate": ["B", "B", "A", "A"]}.get(aggregation, alive[0])  # after B, A, and a B that stayed
    lines = [describe(event) for event in site.events if isinstance(event, RoundApplied)]
    assert ["fewer than two devices" in line for line in lines] == [False, False, True, False]
    assert "not moved: 6 components of layer.0.q, layer.0.v" in lines[2]
    await site.close()
    found = await replay(site)
    assert found.exit_code == 0, found.output
    assert found.stdout.count("as signed") == 4


async def test_a_changed_table_shows_in_the_replay(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    site = Site.make(tmp_path, rounds=1, min_devices=2, tiers=TIERS)
    await fleet(site, session, 1)
    await site.close()
    path = site.folder / "emberlora.toml"
    path.write_text(path.read_text().replace("max_rank = [3, 1]", "max_rank = [2, 1]"))
    found = await replay(site)
    assert found.exit_code == 1
    assert "tiers: signed lowest_block 1 max_rank 3 memory_mib 1024 step_s 2; " in found.stdout


async def test_a_tier_that_the_plan_has_not_is_refused(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """By its number, and a length that no tier has before its body is read; nothing was counted."""
    site = Site.make(tmp_path, min_devices=2, tiers=TIERS)
    (one,) = await fleet(site, session, 1)
    signed = await one.plan()
    frame = one.frame(signed, values_for(site, signed, 0, tier=2), tier=2)
    for claimed, problem in ((3, "UpdateFormatError"), (1, "UpdateLayoutError")):
        hostile = frame[:10] + claimed.to_bytes(2, "little") + frame[12:]
        answer = await one.put(signed, one.seal(signed, hostile))
        assert answer.problem() == problem
    answer = await one.put(signed, one.seal(signed, frame)[:-1])
    lengths = sorted({layout.frame_bytes + 48 for layout in plan_layouts(site.bundle, signed.plan)}, reverse=True)
    assert f"expected {' or '.join(map(str, lengths))} bytes" in json.loads(answer.body)["detail"]
    assert (await site.operator.status()).received == 0
    await site.close()


def test_mean_and_adapter_agree_on_components() -> None:
    """A weak device sends the first component alone: it moves by two devices, the second by one, which is too few."""
    layouts = layouts_of((ModulePlan("l.0.q", 2, "B"),), (Tier(0, max_rank=1),))
    total = RoundSum(layouts, RULES)
    total.add(Update(np.full(layouts[0].count, 1.0, np.float32), 3))
    total.add(Update(np.full(layouts[1].count, 5.0, np.float32), 1, LocalMetrics(tier=1)))
    adapter = {name: np.zeros(shape, np.float32) for name, shape in layouts[0].blocks}
    moved = apply_mean(adapter, layouts[0], total.mean())
    assert moved["l.0.q.lora_b"].tolist() == [[2.0, 0.0], [2.0, 0.0]]
    assert moved["classifier.bias"].tolist() == [2.0, 2.0]
