"""Policy lora-a2: budgets of components hold, pairs are whole, what moves is kept, and replay agrees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import aiohttp
import msgspec
import numpy as np
import pytest
from cloud_fleet import Site, make_bundle, values_for
from hypothesis import given
from hypothesis import strategies as st
from test_cloud_replay import replay

from cloud.aggregate import component_movement
from cloud.planner import AGGREGATIONS, Annealing, Choice, PastRound, Situation, choose
from cloud.planner.lora_a2 import component_budget
from cloud.planning import plan_layout
from edge_runtime.bundle import Bundle, parse_tensors
from edge_runtime.wire import ModulePlan, SignedPlan

R_MAX = 6
ROUNDS = 10
Component = tuple[str, int]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("lora-a2") / "bundle", r_max=R_MAX)


def first(bundle: Bundle, share: float, *, aggregation: str = "alternate", seed: int = 0) -> Situation:
    return Situation(
        manifest=bundle.manifest,
        ranks=dict.fromkeys(bundle.manifest.module_names, R_MAX),
        aggregation=aggregation,
        round=0,
        rounds=ROUNDS,
        seed=seed,
        annealing=Annealing(budget_end=share),
    )


def trained(modules: tuple[ModulePlan, ...]) -> set[Component]:
    return {(m.name, number) for m in modules if m.alive for number in m.trained_components}


def play(situation: Situation, strengths: dict[Component, float]) -> list[tuple[Situation, Choice]]:
    """All rounds of a task in which a trained component moves by its strength."""
    played = []
    for round_ in range(ROUNDS):
        situation = replace(situation, round=round_)
        choice = choose("lora-a2", situation)
        played.append((situation, choice))
        now = trained(choice.modules)
        components = {
            m.name: tuple(strengths[m.name, j] * ((m.name, j) in now) for j in range(m.rank))
            for m in choice.modules
            if m.alive
        }
        moved = {name: float(np.linalg.norm(values)) for name, values in components.items()}
        situation = replace(situation, past=(*situation.past, PastRound(choice.modules, moved, components)))
    return played


def strengths_of(bundle: Bundle, seed: int) -> dict[Component, float]:
    names = bundle.manifest.module_names
    values = iter(np.random.default_rng(seed).exponential(size=len(names) * R_MAX).tolist())
    return {(name, number): next(values) for name in names for number in range(R_MAX)}


@given(share=st.floats(0.01, 1.0), aggregation=st.sampled_from(sorted(AGGREGATIONS)), seed=st.integers(0, 2**32))
def test_budgets_hold_and_pairs_are_whole(bundle: Bundle, share: float, aggregation: str, seed: int) -> None:
    situation = first(bundle, share, aggregation=aggregation, seed=seed)
    played = play(situation, strengths_of(bundle, seed))
    cycle = len(AGGREGATIONS[aggregation])
    for round_, (seen, choice) in enumerate(played):
        now = trained(choice.modules)
        assert len(now) == component_budget(seen) == max(1, int(share * 4 * R_MAX + 1e-9))
        assert {m.alive for m in choice.modules if m.alive} == {AGGREGATIONS[aggregation][round_ % cycle]}
        assert {m.name: m.rank for m in choice.modules} == situation.ranks
        assert all(m.trained is msgspec.UNSET or 0 < len(m.trained) < m.rank for m in choice.modules)
        if round_ % cycle:
            assert now == trained(played[round_ - 1][1].modules)
        assert choose("lora-a2", seen) == choice


@pytest.mark.parametrize(("share", "counts"), [(0.5, [3, 3, 3, 3]), (0.25, [2, 2, 1, 1]), (0.05, [1, 0, 0, 0])])
def test_the_first_pair_shares_equally(bundle: Bundle, share: float, counts: list[int]) -> None:
    modules = choose("lora-a2", first(bundle, share)).modules
    assert [len(m.trained_components) if m.alive else 0 for m in modules] == counts
    assert all(m.trained_components == tuple(range(len(m.trained_components))) for m in modules if m.alive)


def test_the_budget_goes_where_something_moves(bundle: Bundle) -> None:
    """A strong component stays once it was trained; those explored come from everywhere, by the seed."""
    names = bundle.manifest.module_names
    strong = {(names[2], number) for number in (1, 2, 3)}
    strengths = {(name, number): 1e-3 + ((name, number) in strong) for name in names for number in range(R_MAX)}
    seen = set()
    for seed in range(20):
        played = [trained(choice.modules) for _, choice in play(first(bundle, 0.25, seed=seed), strengths)]
        for round_, now in enumerate(played):
            assert now >= strong & set().union(*played[:round_])
        assert played[0] == {(names[0], 0), (names[0], 1), (names[1], 0), (names[1], 1), (names[2], 0), (names[3], 0)}
        seen |= set().union(*played)
    assert seen == set(strengths)


@given(seed=st.integers(0, 2**32), moves=st.sampled_from(["A", "B", "AB"]))
def test_movement_of_components_is_that_of_their_products(bundle: Bundle, seed: int, moves: str) -> None:
    """The oracle forms every rank-one matrix; a module that stayed is left out."""
    rng = np.random.default_rng(seed)
    before = {
        name: rng.normal(size=a.shape).astype(np.float32)
        for name, a in parse_tensors((bundle.folder / "adapter.safetensors").read_bytes(), what="adapter").items()
    }
    still = bundle.manifest.module_names[1]
    after = {
        name: a + rng.normal(scale=0.1, size=a.shape).astype(np.float32)
        if name[-1].upper() in moves and not name.startswith(still)
        else a
        for name, a in before.items()
    }
    found = component_movement(bundle.manifest, before, after)
    assert set(found) == set(bundle.manifest.module_names) - {still}
    for name, values in found.items():
        for j, value in enumerate(values):
            new, old = (
                np.outer(t[f"{name}.lora_b"][:, j].astype(np.float64), t[f"{name}.lora_a"][j].astype(np.float64))
                for t in (after, before)
            )
            assert value == pytest.approx(bundle.manifest.scale * np.linalg.norm(new - old), rel=6e-4)


@pytest.mark.parametrize("upload", ["float32", "int8"])
async def test_a_task_sends_its_budget_and_is_replayed(
    tmp_path: Path, session: aiohttp.ClientSession, upload: str
) -> None:
    """Untrained components stay bit for bit, a restart changes nothing, and every plan is made again as signed."""
    bundle = make_bundle(tmp_path / "bundle", r_max=R_MAX)
    annealing = {"budget_end": 0.25, "initiating_rounds": 0, "final_rounds": 0}
    site = Site.make(tmp_path, bundle=bundle, policy="lora-a2", rounds=6, annealing=annealing, upload=upload)
    await site.start()
    one, two = [await site.device(session, name) for name in ("one", "two")]
    signed = await one.plan()
    chosen = []
    while signed.plan.state == "train":
        chosen.append(trained(signed.plan.modules))
        adapter = parse_tensors((await one.blob(signed.plan.adapter)).body, what="adapter")
        for number, device in enumerate((one, two)):
            values = values_for(site, signed, signed.plan.round + number)
            if signed.plan.quantisation:
                values = np.zeros_like(values) if number else _codes(site, signed)
            assert (await device.put(signed, device.seal(signed, device.frame(signed, values)))).status == 201
        ended, signed = signed, await one.plan(after=signed.plan.round)
        if signed.plan.round == 3:
            await site.restart()
        moved = parse_tensors((await one.blob(signed.plan.adapter)).body, what="adapter")
        for module in ended.plan.modules:
            name = f"{module.name}.lora_{module.alive.lower() or 'a'}"
            axis = 1 if module.alive == "B" else 0
            differs = np.any(moved[name] != adapter[name], axis=1 - axis)
            assert set(np.flatnonzero(differs)) == ({*module.trained_components} if module.alive else set())
    assert [len(components) for components in chosen] == [6] * 6
    assert chosen[0] == chosen[1] != chosen[2] == chosen[3]
    await site.close()
    found = await replay(site, "--json")
    assert found.exit_code == 0, found.output
    lines = [msgspec.json.decode(line) for line in found.stdout.splitlines()]
    sizes = bundle.manifest.features
    assert [line["parameters"] for line in lines] == [
        sum(sizes[name][round_ % 2 == 0] for name, _ in components) for round_, components in enumerate(chosen)
    ]


def _codes(site: Site, signed: SignedPlan) -> np.ndarray:
    """A change that codes stand for: the largest of every tensor, for all of its elements."""
    layout = plan_layout(site.bundle, signed.plan)
    quantisation = signed.plan.quantisation
    assert quantisation
    return np.concatenate(
        [np.full(size, range_, np.float32) for size, range_ in zip(layout.sizes, quantisation.ranges, strict=True)]
    )
