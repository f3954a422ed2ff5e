"""Who lives and what it trains: cycles are never cut, budgets hold, and a plan follows from its history."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

import msgspec
import numpy as np
import pytest
from cloud_fleet import make_bundle
from hypothesis import given
from hypothesis import strategies as st

from cloud.planner import AGGREGATIONS, Annealing, PastRound, Situation, choose
from cloud.planner.annealing import CURVES, budget_share, lowest_block
from cloud.planner.scores import scores
from edge_runtime.bundle import Bundle, Manifest, Module
from edge_runtime.wire import ModulePlan

ROUNDS = 14


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("lives") / "bundle", r_max=3)


@dataclass(frozen=True)
class Task:
    """Everything a task of random movements follows from."""

    policy: str
    aggregation: str
    annealing: Annealing
    sizes: tuple[int, ...]  # parameters of one component of every module
    seed: int

    def manifest(self, template: Manifest) -> Manifest:
        modules = tuple(Module(f"layer.{i}.q", i, "q", size - 1, 1) for i, size in enumerate(self.sizes))
        return msgspec.structs.replace(template, modules=modules, blocks=template.blocks[:1] * len(self.sizes))

    def situation(self, template: Manifest, past: tuple[PastRound, ...]) -> Situation:
        manifest = self.manifest(template)
        return Situation(
            manifest=manifest,
            ranks={module.name: 1 + module.block % 3 for module in manifest.modules},
            aggregation=self.aggregation,
            round=len(past),
            rounds=ROUNDS,
            seed=self.seed,
            annealing=self.annealing,
            past=past,
        )

    def history(self, template: Manifest) -> tuple[PastRound, ...]:
        """All rounds, in which living modules move at random."""
        rng = np.random.default_rng(self.seed)
        past: tuple[PastRound, ...] = ()
        while len(past) < ROUNDS:
            modules = choose(self.policy, self.situation(template, past)).modules
            past = (*past, PastRound(modules, {m.name: float(rng.exponential()) * bool(m.alive) for m in modules}))
        return past


def tasks() -> st.SearchStrategy[Task]:
    annealings = st.builds(
        lambda start, part, curve, initiating, heating, final, heat, deep, deeper: Annealing(
            budget_start=start,
            budget_end=start * part,
            curve=curve,
            initiating_rounds=initiating,
            heating_rounds=heating,
            final_rounds=final,
            temperature_start=heat,
            temperature_end=heat / 10,
            depth_start=deep,
            depth_end=deep * deeper,
        ),
        st.floats(0.2, 0.7),
        st.floats(0.3, 1.0),
        st.sampled_from(sorted(CURVES)),
        st.integers(0, 3),
        st.sampled_from([0, 0, 3]),
        st.integers(0, 3),
        st.floats(0.01, 100.0),
        st.sampled_from([1.0, 0.6]),
        st.sampled_from([1.0, 0.5, 0.1]),
    )
    return st.builds(
        Task,
        st.sampled_from(["kill-revive", "annealed-kill-revive"]),
        st.sampled_from(sorted(AGGREGATIONS)),
        annealings,
        st.lists(st.integers(2, 30), min_size=5, max_size=9).map(tuple),
        st.integers(0, 2**32 - 1),
    )


CYCLES = {"alternate": "BA", "b-only": "B", "a-only": "A", "both": ("AB",), "stack": ("AB",)}


@given(tasks())
def test_every_life_begins_with_b_and_ends_with_a_cycle(bundle: Bundle, task: Task) -> None:
    """A life is a run of living rounds; only the end of the task may cut its last cycle."""
    cycle = tuple(CYCLES[task.aggregation])
    history = task.history(bundle.manifest)
    for number in range(len(task.sizes)):
        trained = [round_.modules[number].alive for round_ in history]
        lives = [list(run) for alive, run in groupby(trained, key=bool) if alive]
        for life in lives:
            assert life == [cycle[age % len(cycle)] for age in range(len(life))]
        for life in lives if not trained[-1] else lives[:-1]:
            assert len(life) % len(cycle) == 0


@given(tasks())
def test_what_lives_fits_the_budget_of_every_round(bundle: Bundle, task: Task) -> None:
    """After the initiating rounds, and the cycle they end in: no more than the budget, unless one module is alone."""
    history = task.history(bundle.manifest)
    ranks = task.situation(bundle.manifest, ()).ranks
    whole = bundle.manifest.r_max * sum(task.sizes)
    initiating = max(task.annealing.initiating_rounds, 1)
    if task.aggregation == "alternate":
        initiating += initiating % 2
    for number, round_ in enumerate(history):
        living = [module.name for module in round_.modules if module.alive]
        assert living
        if number < initiating:
            assert len(living) >= len(task.sizes) - lowest_block(task.annealing, range(len(task.sizes)), number, ROUNDS)
            continue
        share = task.annealing.budget_end
        if task.policy == "annealed-kill-revive":
            share = budget_share(task.annealing, number, ROUNDS)
        costs = [ranks[name] * size for name, size in zip(ranks, task.sizes, strict=True) if name in living]
        assert sum(costs) <= share * whole or len(living) == 1


@given(tasks())
def test_nothing_is_born_too_deep(bundle: Bundle, task: Task) -> None:
    """What lives there when the depth falls ends its cycle, and never comes back."""
    cycle = len(CYCLES[task.aggregation])
    lowest = [lowest_block(task.annealing, range(len(task.sizes)), number, ROUNDS) for number in range(ROUNDS)]
    assert lowest == sorted(lowest)
    history = task.history(bundle.manifest)
    for number, round_ in enumerate(history):
        deep = [module.name for module in round_.modules[: lowest[number]] if module.alive]
        since = history[max(0, number - cycle + 1) : number]
        begun = [
            name for name in deep if not any(module.alive for r in since for module in r.modules if module.name == name)
        ]
        assert not begun


@pytest.mark.parametrize(
    ("start", "end", "lowest"),
    [(1.0, 1.0, {0}), (1.0, 1 / 3, {0, 1, 2, 3, 4}), (0.5, 1 / 3, {3, 4}), (0.5, 0.01, {3, 4, 5}), (0.34, 0.34, {3})],
)
def test_the_depth_falls_with_the_budget(start: float, end: float, lowest: set[int]) -> None:
    """Of six blocks: from the start's share to the end's, one block at least, a share of a block counts as one."""
    settings = Annealing(depth_start=start, depth_end=end)
    found = [lowest_block(settings, range(6), round_, 30) for round_ in range(30)]
    assert set(found) == lowest
    assert found[-1] == max(lowest)


@pytest.mark.parametrize("policy", ["anneal", "kill-revive", "annealed-kill-revive"])
def test_depth_is_of_the_blocks_that_have_modules(bundle: Bundle, policy: str) -> None:
    """An adapter of the first blocks alone is trained to the end, however shallow the depth."""
    task = Task(policy, "alternate", Annealing(depth_end=0.01), (10,) * 4, 0)
    start = task.situation(bundle.manifest, ())
    above = msgspec.structs.replace(start.manifest, blocks=start.manifest.blocks * 3)
    last = replace(start, manifest=above, round=ROUNDS - 2, energies=dict.fromkeys(start.names, (1.0,)))
    assert [module.name for module in choose(policy, last).modules if module.alive] == [start.names[-1]]


def test_annealing_leaves_what_is_too_deep_as_it_is(bundle: Bundle) -> None:
    """Its rank stays, and the budget goes to the others."""
    settings = Annealing(budget_start=0.4, budget_end=0.4, depth_end=0.4, initiating_rounds=0, final_rounds=2)
    task = Task("anneal", "alternate", settings, (10,) * 5, 0)
    start = task.situation(bundle.manifest, ())
    now = replace(
        start, ranks=dict.fromkeys(start.names, 3), round=12, energies=dict.fromkeys(start.names, (3.0, 2.0, 1.0))
    )
    assert [(module.rank, bool(module.alive)) for module in choose("anneal", now).modules] == [
        (3, False),
        (3, False),
        (3, False),
        (3, True),
        (3, True),
    ]


@given(tasks(), st.integers(0, ROUNDS - 1))
def test_a_plan_follows_from_config_seed_and_history(bundle: Bundle, task: Task, round_: int) -> None:
    history = task.history(bundle.manifest)
    assert history == task.history(bundle.manifest)
    again = choose(task.policy, task.situation(bundle.manifest, history[:round_]))
    assert again.modules == history[round_].modules


@pytest.mark.parametrize("policy", ["fixed", "anneal"])
def test_all_are_born_in_round_0(bundle: Bundle, policy: str) -> None:
    """So where nothing is killed, factors follow the round's number."""
    task = Task(policy, "alternate", Annealing(budget_end=0.5), (5, 9, 4), 0)
    for number, round_ in enumerate(task.history(bundle.manifest)):
        assert {module.alive for module in round_.modules} == {"A" if number % 2 else "B"}


def test_a_module_that_is_born_in_an_odd_round_trains_b(bundle: Bundle) -> None:
    """Cheap winners of challenges leave room, and heat lets all win: what fits begins while the others train A."""
    settings = Annealing(budget_end=100 / 420, initiating_rounds=2, temperature_start=1e12, temperature_end=1.0)
    task = Task("kill-revive", "alternate", settings, (60, 40, 20, 20), 0)
    template = bundle.manifest
    moved = dict(zip(task.situation(template, ()).names, (240.0, 80.0, 20.0, 10.0), strict=True))
    past: tuple[PastRound, ...] = ()
    trained = []
    for _ in range(5):
        now = replace(task.situation(template, past), ranks=dict.fromkeys(moved, 1))
        modules = choose("kill-revive", now).modules
        past = (*past, PastRound(modules, {m.name: moved[m.name] * bool(m.alive) for m in modules}))
        trained.append([module.alive for module in modules])
    assert trained[:2] == [["B"] * 4, ["A"] * 4]
    assert trained[2:] == [["", "", "B", "B"], ["", "B", "A", "A"], ["", "A", "B", ""]]


@pytest.mark.parametrize(("policy", "begins"), [("kill-revive", "B"), ("annealed-kill-revive", "")])
def test_a_birth_leaves_room_for_the_best(bundle: Bundle, policy: str, begins: str) -> None:
    """33 beside 61 fit 95 parameters. When these fall to 90, the best with its 60 could not live on beside 33."""
    annealing = Annealing(
        budget_start=100 / 282,
        budget_end=(95 if policy == "kill-revive" else 40) / 282,
        curve="linear",
        initiating_rounds=2,
        final_rounds=0,
    )
    task = Task(policy, "alternate", annealing, (60, 1, 33), 0)
    names = task.situation(bundle.manifest, ()).names
    moved = dict(zip(names, (60.0, 0.5, 3.3), strict=True))
    lives = [("B", "B", "B"), ("A", "A", "A"), ("B", "B", "")]
    past = tuple(
        PastRound(tuple(ModulePlan(name, 1, alive) for name, alive in zip(names, round_, strict=True)), moved)
        for round_ in lives
    )
    now = replace(task.situation(bundle.manifest, past), ranks=dict.fromkeys(names, 1))
    assert [module.alive for module in choose(policy, now).modules] == ["A", "A", begins]


def test_factors_are_compared_with_their_own_kind() -> None:
    """In a round in which some train A and one B, B is compared with what B moved the others the round before."""
    sizes = dict.fromkeys("abc", 1)
    before = PastRound(tuple(ModulePlan(n, 1, "B" if n != "c" else "") for n in "abc"), {"a": 6.0, "b": 2.0, "c": 0.0})
    now = PastRound(tuple(ModulePlan(n, 1, "A" if n != "c" else "B") for n in "abc"), {"a": 0.3, "b": 0.1, "c": 1.0})
    found = scores([before, now], sizes)
    assert found == pytest.approx({"a": 1.5, "b": 0.5, "c": 1.0 / 3.0})
