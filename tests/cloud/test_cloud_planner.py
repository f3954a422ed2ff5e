"""Policies: what they may do at most, and that the same situation gives the same plan."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from cloud_fleet import make_bundle
from hypothesis import given
from hypothesis import strategies as st

from cloud.aggregate import module_energies
from cloud.planner import POLICIES, Annealing, PastRound, Situation, annealing_problems, choose
from cloud.planner.anneal import fit_ranks
from cloud.planner.annealing import CURVES, budget_share, cooled, temperature
from cloud.planner.kill_revive import challenge, survive
from cloud.planner.scores import scores
from edge_runtime.bundle import Bundle
from edge_runtime.wire import ModulePlan

SETTINGS = Annealing(budget_start=1.0, budget_end=0.5, initiating_rounds=2, final_rounds=2, initiating_mu=0.1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("planner") / "bundle", r_max=3)


def situation(bundle: Bundle, round_: int, *, ranks: dict[str, int] | None = None, seed: int = 0) -> Situation:
    """Of ten rounds, with an adapter of random B; all modules have lived so far."""
    rng = np.random.default_rng(seed)
    start = bundle.initial_adapter()
    adapter = {k: rng.normal(size=v.shape).astype(np.float32) if k.endswith("_b") else v for k, v in start.items()}
    return Situation(
        manifest=bundle.manifest,
        ranks=ranks or dict.fromkeys(bundle.manifest.module_names, 3),
        aggregation="alternate",
        round=round_,
        rounds=10,
        seed=0,
        annealing=SETTINGS,
        energies=module_energies(bundle.manifest, adapter),
        past=(PastRound(tuple(ModulePlan(name, 3, "AB") for name in bundle.manifest.module_names), {}),) * round_,
    )


@pytest.mark.parametrize("curve", CURVES)
def test_the_budget_falls_from_start_to_end(curve: str) -> None:
    """It stays at either end as long as it was told to, and never rises."""
    settings = Annealing(curve=curve, budget_start=0.9, budget_end=0.2, initiating_rounds=3, final_rounds=4)
    shares = [budget_share(settings, round_, 20) for round_ in range(20)]
    assert shares[:4] == pytest.approx([0.9] * 4)
    assert shares[16:] == pytest.approx([0.2] * 4)
    assert all(later <= earlier for earlier, later in pairwise(shares))
    assert [cooled(settings, round_, 20) for round_ in (3, 16)] == [0.0, 1.0]


def test_the_temperature_falls_geometrically() -> None:
    settings = Annealing(initiating_rounds=2, final_rounds=2, temperature_start=0.8, temperature_end=0.05)
    heats = [temperature(settings, round_, 9) for round_ in range(9)]
    assert heats[:3] == pytest.approx([0.8] * 3)
    assert heats[7:] == pytest.approx([0.05] * 2)
    ratios = [later / earlier for earlier, later in pairwise(heats[2:8])]
    assert ratios == pytest.approx([ratios[0]] * 5)


def test_no_room_to_cool_is_a_step() -> None:
    settings = Annealing(initiating_rounds=4, final_rounds=6)
    assert [cooled(settings, round_, 10) for round_ in (3, 4)] == [0.0, 1.0]


def test_every_wrong_setting_is_named() -> None:
    settings = Annealing(
        budget_start=0.0,
        budget_end=0.5,
        curve="steep",
        initiating_rounds=-1,
        heating_rounds=3,
        final_rounds=20,
        initiating_mu=float("nan"),
        temperature_start=0.1,
        temperature_end=0.2,
        depth_start=0.0,
        depth_end=2.0,
    )
    assert len(annealing_problems(settings, 10)) == 8
    assert annealing_problems(Annealing(), 10) == []


Energies = st.dictionaries(
    st.sampled_from("abcdef"),
    st.lists(st.floats(0, 10), min_size=1, max_size=5).map(lambda values: tuple(sorted(values, reverse=True))),
    min_size=1,
)


@given(Energies, st.integers(0, 200), st.data())
def test_ranks_fit_the_budget(energies: dict[str, tuple[float, ...]], parameters: int, data: st.DataObject) -> None:
    """One component of every module always; beyond that no more than the budget, and no rank that is not there."""
    sizes = {name: data.draw(st.integers(1, 20)) for name in energies}
    ranks = fit_ranks(energies, sizes, parameters)
    assert all(1 <= ranks[name] <= len(values) for name, values in energies.items())
    used = sum(ranks[name] * sizes[name] for name in ranks)
    assert used <= max(parameters, sum(sizes.values()))


def test_energy_by_parameter_decides() -> None:
    """A cheap component with a little less energy goes first."""
    energies = {"large": (5.0, 2.0, 1.0), "small": (5.0, 1.9, 0.1)}
    assert fit_ranks(energies, {"large": 10, "small": 1}, 12) == {"large": 1, "small": 2}
    assert fit_ranks(energies, {"large": 10, "small": 1}, 22) == {"large": 2, "small": 2}


def test_equal_energies_take_turns() -> None:
    """As before the first round, when all are zero."""
    energies = dict.fromkeys("abc", (0.0,) * 4)
    assert fit_ranks(energies, dict.fromkeys("abc", 2), 18) == {"a": 3, "b": 3, "c": 3}


def test_anneal_cools_in_pairs_of_rounds(bundle: Bundle) -> None:
    """Ranks fall in even rounds only, fit the budget, and never rise again; the pull is of the first rounds."""
    ranks = dict.fromkeys(bundle.manifest.module_names, 3)
    alive = []
    for round_ in range(10):
        now = situation(bundle, round_, ranks=ranks)
        now = replace(now, energies={name: values[: ranks[name]] for name, values in now.energies.items()})
        choice = choose("anneal", now)
        chosen = {module.name: module.rank for module in choice.modules}
        assert all(chosen[name] <= ranks[name] for name in ranks)
        assert round_ % 2 == 0 or chosen == ranks
        assert {module.alive for module in choice.modules} == {"A" if round_ % 2 else "B"}
        assert choice.mu == (0.1 if round_ < 2 else None)
        assert choice.head_alive
        ranks = chosen
        alive.append(sum(now.component_sizes[name] * rank for name, rank in ranks.items()) / now.full_parameters)
    assert alive[:2] == [1.0, 1.0]
    assert 0.3 < alive[-1] <= 0.5
    assert len({rank for rank in ranks.values()}) > 1, "energies differ, so ranks do"


def test_heating_climbs_to_the_start_and_then_cools() -> None:
    """Initiating at the start's budget, up from the end's in equal steps, then down."""
    settings = Annealing(
        budget_start=0.8, budget_end=0.2, curve="linear", initiating_rounds=1, heating_rounds=2, final_rounds=1
    )
    found = [budget_share(settings, round_, 7) for round_ in range(7)]
    assert found == pytest.approx([0.8, 0.4, 0.6, 0.8, 0.6, 0.4, 0.2])


def test_anneal_grows_while_it_heats(bundle: Bundle) -> None:
    """From the end's budget to the start's, modules in turns, and then down; a rank never exceeds the task's."""
    settings = Annealing(budget_start=1.0, budget_end=0.34, initiating_rounds=0, heating_rounds=4, final_rounds=2)
    ranks, totals = dict.fromkeys(bundle.manifest.module_names, 3), []
    for round_ in range(10):
        now = replace(situation(bundle, round_, ranks=ranks), annealing=settings)
        energies = {name: tuple(0.5**place for place in range(rank)) for name, rank in ranks.items()}
        modules = choose("anneal", replace(now, energies=energies)).modules
        ranks = {module.name: module.rank for module in modules}
        share = budget_share(settings, round_ - round_ % 2, 10)
        total = sum(now.component_sizes[name] * rank for name, rank in ranks.items())
        assert total <= max(share * now.full_parameters, sum(now.component_sizes.values()))
        assert max(ranks.values()) <= 3
        totals.append(total)
    assert totals[0] < totals[2] < totals[4]
    assert totals[4:] == sorted(totals[4:], reverse=True)
    assert totals[4] == sum(3 * size for size in now.component_sizes.values())


Scores = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 5), min_size=2)


@given(Scores, st.integers(0, 60), st.data())
def test_survivors_fit_the_budget(found: dict[str, float], parameters: int, data: st.DataObject) -> None:
    """The best module lives whatever it costs; a dead one would not have fitted beside the better ones that live."""
    costs = {name: data.draw(st.integers(1, 20)) for name in found}
    living = survive(found, costs, parameters)
    best = max(found.values())
    assert any(found[name] == best for name in living)
    assert len(living) == 1 or sum(costs[name] for name in living) <= parameters
    for name in set(found) - living:
        better = sum(costs[other] for other in living if found[other] >= found[name])
        assert better + costs[name] > parameters


@given(Scores, st.floats(0, 10), st.integers(0, 2**32 - 1), st.data())
def test_challenges_never_raise_the_cost(found: dict[str, float], heat: float, seed: int, data: st.DataObject) -> None:
    """As many live as before, for no more parameters."""
    costs = {name: data.draw(st.integers(1, 20)) for name in found}
    living = set(data.draw(st.sets(st.sampled_from(sorted(found)), min_size=1)))
    now = challenge(found, costs, living, heat=heat, rng=np.random.default_rng(seed))
    assert len(now) == len(living)
    assert sum(costs[name] for name in now) <= sum(costs[name] for name in living)


def test_cold_revives_only_the_stronger() -> None:
    found = {"weak": 1.0, "strong": 3.0, "weaker": 0.9, "better": 1.1}
    costs = dict.fromkeys(found, 1)
    living = {"weak", "strong"}
    for heat in (0.0, 1e-6):
        now = challenge(found, costs, living, heat=heat, rng=np.random.default_rng(0))
        assert now == {"better", "strong"}


def test_heat_revives_freely() -> None:
    """Every challenger wins, until all places are held by new ones."""
    found = {"a": 5.0, "b": 4.0, "c": 0.2, "d": 0.1, "e": 0.0}
    now = challenge(found, dict.fromkeys(found, 1), {"a", "b"}, heat=1e12, rng=np.random.default_rng(0))
    assert now == {"c", "d"}


def test_the_chance_is_metropolis() -> None:
    """exp(-gap / (heat · mean)), by frequency."""
    found, costs = {"alive": 2.0, "dead": 1.0}, {"alive": 1, "dead": 1}
    rng = np.random.default_rng(0)
    wins = sum(challenge(found, costs, {"alive"}, heat=0.5, rng=rng) == {"dead"} for _ in range(4000))
    assert wins / 4000 == pytest.approx(np.exp(-1.0), abs=0.03)


def test_scores_compare_within_a_round_by_parameter_and_fade() -> None:
    """Twice the size needs twice the movement; a dead module keeps its score, a tenth less every round."""
    plan = {name: ModulePlan(name, 1, "B") for name in "abc"}
    dead = ModulePlan("c", 1, "")
    sizes = {"a": 1, "b": 2, "c": 1}
    first = PastRound((plan["a"], plan["b"], plan["c"]), {"a": 1.0, "b": 2.0, "c": 1.0})
    assert scores([first], sizes) == pytest.approx({"a": 1.0, "b": 1.0, "c": 1.0})
    later = PastRound((plan["a"], plan["b"], dead), {"a": 0.03, "b": 0.02, "c": 0.0})
    assert scores([first, later], sizes) == pytest.approx({"a": 1.25, "b": 0.75, "c": 0.9})
    still = PastRound((plan["a"],), {"a": 0.0})
    assert scores([still], sizes) == {"a": 1.0}
    assert scores([], sizes) == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_situations_give_equal_choices(bundle: Bundle, policy: str) -> None:
    assert all(
        choose(policy, situation(bundle, round_)) == choose(policy, situation(bundle, round_)) for round_ in range(10)
    )
