"""A budget in bytes: costs are those of the wire to the byte, and no task spends more than its operator gave.

The oracles are the wire's own encoders and the policies themselves, played round for round; neither shares code with
the plan of bytes.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
from cloud_fleet import Site, make_bundle, values_for
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from test_cloud_replay import replay

from cloud.budgeting import with_budget
from cloud.config import Config, parse_config
from cloud.errors import ConfigError
from cloud.planner import AGGREGATIONS, Annealing, PastRound, Situation, Tiers, Traffic, afford, choose, plan_tiers
from cloud.planner.annealing import CURVES
from cloud.planner.byte_budget import least_bytes, planned_bytes, planned_share
from cloud.planner.costs import fixed_bytes, plan_bytes, result_bytes, update_bytes
from cloud.planning import plan_layout
from edge_runtime import wire
from edge_runtime.bundle import Bundle, Manifest, Slot
from edge_runtime.wire.codes import UpdateBits
from edge_runtime.wire.components import rounded
from edge_runtime.wire.patch import change_of
from edge_runtime.wire.patch_frame import PatchBits

BITS: tuple[PatchBits, ...] = (32, 8, 4)
UP_BITS: tuple[UpdateBits, ...] = (*BITS, 2)
BUDGETED = ("anneal", "kill-revive", "annealed-kill-revive", "lora-a2")
WIDE = (Slot("q", 96, 64), Slot("v", 96, 193))
ORDER = ("float32", "int8", "int4")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bytes") / "bundle", r_max=3)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bytes") / "wide", slots=WIDE, r_max=4)


def traffic_of(manifest: Manifest, upload: UpdateBits, download: PatchBits, **changes: Any) -> Traffic:
    parts: dict[str, Any] = {"task": "tiny", "aggregation": "alternate", "rank": manifest.r_max, "head_trained": True}
    return Traffic(manifest=manifest, upload=upload, download=download, **(parts | changes))


def random_modules(manifest: Manifest, rng: random.Random) -> tuple[wire.ModulePlan, ...]:
    found = []
    for name in manifest.module_names:
        rank, alive = rng.randint(1, manifest.r_max), rng.choice(["", "A", "B", "AB"])
        listed = sorted(rng.sample(range(rank), rng.randint(1, rank)))
        found.append(
            wire.ModulePlan(name, rank, alive, tuple(listed) if alive and len(listed) < rank else msgspec.UNSET)
        )
    return tuple(found)


def real_bytes(traffic: Traffic, modules: tuple[wire.ModulePlan, ...]) -> tuple[int, int, int]:
    """Lengths of a sealed update, a patch and a signed plan, made with the wire's encoders."""
    features, head = traffic.manifest.features, traffic.head
    layout = wire.layout_of(modules, features, head)
    ranges = tuple(0.1 + 1 / (3 + number) for number in range(len(layout.blocks)))
    density = msgspec.UNSET if traffic.upload_density == 1 else traffic.upload_density
    quantisation = msgspec.UNSET if traffic.upload == 32 else wire.Quantisation(traffic.upload, ranges, density)
    plan = wire.Plan(
        schema=1,
        task=traffic.task,
        round=3,
        rounds=12,
        state="train",
        bundle="a" * 64,
        adapter="b" * 64,
        adapter_bytes=123_456,
        modules=modules,
        head_alive=bool(head),
        training=wire.Training(16, 64, 1 / 3, 1 / 7, 1 / 9, epochs=1),
        update=wire.UpdateRules(),
        seed=2**40,
        deadline=1_700_000_000.123,
        round_key=X25519PrivateKey.generate().public_key().public_bytes_raw().hex(),
        quantisation=quantisation,
        tiers=plan_tiers(traffic.tiers, traffic.manifest, modules),
    )
    signed = wire.sign_plan(plan, Ed25519PrivateKey.generate())
    layout = wire.layout_of(modules, features, head, quantisation or None)
    update = wire.Update(np.zeros(layout.count, np.float32), 1)
    frame = wire.encode_update(update, signed_plan=signed, layout=layout)
    sealed = wire.seal(frame, round_key=plan.round_key, context=wire.EnvelopeContext.of(signed, "one"))
    whole = wire.adapter_layout(plan.ranks, features, traffic.manifest.head_shapes)
    living = {module.name: module.trained_components for module in modules if module.alive}
    rng = np.random.default_rng(0)
    changes = {
        name: change_of(name, values if traffic.download == 32 else rounded(name, values, traffic.download), numbers)
        for name, shape in whole.blocks
        if (numbers := living.get(name.rpartition(".")[0], range(shape[0]) if name in head else ()))
        for values in [rng.normal(size=shape).astype(np.float32)]
    }
    patch = wire.encode_patch(wire.PatchHead(2, 3, "b" * 64, traffic.download), changes, whole)
    return len(sealed), len(patch), len(signed.data)


@given(
    st.sampled_from(UP_BITS),
    st.sampled_from(BITS),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1.0, 0.3, 0.05]),
    st.randoms(use_true_random=False),
)
def test_costs_are_those_of_the_wire(
    bundle: Bundle, upload: UpdateBits, download: PatchBits, head: bool, tiers: bool, density: float, rng: random.Random
) -> None:
    """Update and plain patch to the byte; a plan is no longer than its estimate."""
    traffic = traffic_of(bundle.manifest, upload, download, head_trained=head, tiers=Tiers(enabled=tiers))
    traffic = replace(traffic, upload_density=1.0 if upload == 32 else density)
    modules = random_modules(bundle.manifest, rng)
    sealed, patch, plan = real_bytes(traffic, modules)
    assert (update_bytes(traffic, modules), result_bytes(traffic, modules)) == (sealed, patch)
    assert plan <= plan_bytes(traffic, modules) <= plan + 700
    longest = fixed_bytes(traffic, lists_components=True)
    nothing = tuple(wire.ModulePlan(module.name, module.rank, "") for module in modules)
    assert longest >= update_bytes(traffic, nothing) + result_bytes(traffic, nothing) + plan


@st.composite
def budgets(draw: st.DrawFn) -> tuple[Annealing, str, str, UpdateBits, PatchBits]:
    """Shape, policy, aggregation and bits."""
    start = draw(st.floats(0.05, 1.0))
    depth = draw(st.sampled_from([1.0, 0.7]))
    initiating = draw(st.integers(0, 3))
    settings = Annealing(
        budget_start=start,
        budget_end=start * draw(st.floats(0.1, 1.0)),
        curve=draw(st.sampled_from(sorted(CURVES))),
        initiating_rounds=initiating,
        heating_rounds=draw(st.sampled_from([0, 0, 2])),
        final_rounds=draw(st.integers(0, 3)),
        temperature_start=draw(st.floats(0.01, 100.0)),
        temperature_end=0.01,
        depth_start=depth,
        depth_end=depth * draw(st.sampled_from([1.0, 0.4])),
    )
    policy, aggregation = draw(st.sampled_from(BUDGETED)), draw(st.sampled_from(sorted(AGGREGATIONS)))
    return settings, policy, aggregation, draw(st.sampled_from(UP_BITS)), draw(st.sampled_from(BITS))


def play(
    traffic: Traffic, policy: str, settings: Annealing, rounds: int, seed: int
) -> list[tuple[wire.ModulePlan, ...]]:
    """What a policy chooses in every round while modules move at random."""
    rng = np.random.default_rng(seed)
    names, past = traffic.manifest.module_names, ()
    ranks = dict.fromkeys(names, traffic.rank)
    for round_ in range(rounds):
        energies = {name: tuple(sorted(rng.exponential(size=ranks[name]), reverse=True)) for name in names}
        situation = Situation(
            traffic.manifest,
            ranks,
            traffic.aggregation,
            round_,
            rounds,
            seed,
            settings,
            full_rank=traffic.rank,
            energies=energies,
            past=past,
        )
        modules = choose(policy, situation).modules
        ranks = {module.name: module.rank for module in modules}
        components = {m.name: tuple(rng.exponential(size=m.rank)) for m in modules if m.alive}
        moved = {name: float(np.linalg.norm(values)) for name, values in components.items()}
        # In some rounds too few devices carry a module.
        few = (m for m in modules if m.alive and seed % 2 and rng.random() < 0.3)
        idle = {module.name: module.trained_components for module in few}
        past = (*past, PastRound(modules, moved, components, idle=idle))
    return [round_.modules for round_ in past]


@given(
    budgets(),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=4, max_size=4),
    st.integers(1, 6),
    st.integers(4, 14),
    st.floats(1.0, 3.0),
    st.integers(0, 2**32 - 1),
)
def test_no_task_costs_more_than_its_budget(
    bundle: Bundle, drawn: Any, sizes: list[tuple[int, int]], rank: int, rounds: int, room: float, seed: int
) -> None:
    """Nor any round more than it was planned at; and where bytes are left, the next share up would not have fitted."""
    settings, policy, aggregation, upload, download = drawn
    if settings.initiating_rounds + settings.final_rounds > rounds:
        settings = msgspec.structs.replace(settings, final_rounds=0)
    modules = tuple(
        msgspec.structs.replace(module, in_features=size[0], out_features=size[1])
        for module, size in zip(bundle.manifest.modules, sizes, strict=True)
    )
    manifest = msgspec.structs.replace(bundle.manifest, modules=modules)
    traffic = traffic_of(manifest, upload, download, aggregation=aggregation, rank=rank)
    least = least_bytes(settings, policy, traffic, rounds)
    allowed = int(least * room)
    found = afford(settings, policy, traffic, rounds=rounds, allowed=allowed)
    assert found is not None
    assert afford(settings, policy, traffic, rounds=rounds, allowed=least - 1) is None
    planned = planned_bytes(found.settings, policy, traffic, rounds)
    assert sum(planned) <= allowed
    for most, chosen in zip(planned, play(traffic, policy, found.settings, rounds, seed), strict=True):
        cost = update_bytes(traffic, chosen) + result_bytes(traffic, chosen) + plan_bytes(traffic, chosen)
        assert cost <= most
    larger = msgspec.structs.replace(
        found.settings,
        budget_start=found.settings.budget_start * 1.01 + 1e-6,
        budget_end=found.settings.budget_end * 1.01 + 1e-6,
    )
    more = planned_bytes(larger, policy, traffic, rounds)
    assert sum(more) > allowed or more == planned


@given(budgets(), st.floats(1.0, 4.0), st.floats(1.0, 4.0))
def test_more_bytes_never_mean_a_smaller_share(bundle: Bundle, drawn: Any, one: float, other: float) -> None:
    """With the same bits a value."""
    settings, policy, aggregation, upload, download = drawn
    traffic = traffic_of(bundle.manifest, upload, download, aggregation=aggregation)
    least = least_bytes(settings, policy, traffic, 9)
    cycle = len(AGGREGATIONS[aggregation])
    shares = []
    for room in sorted((one, other)):
        found = afford(settings, policy, traffic, rounds=9, allowed=int(least * room))
        assert found is not None
        shares.append([planned_share(found.settings, policy, t, rounds=9, cycle=cycle) for t in range(9)])
    assert all(small <= large for small, large in zip(*shares, strict=True))


def config_of(*, per_round: int, policy: str = "anneal", rounds: int = 8, **task: object) -> Config:
    keys = {"name": "tiny", "bundle": "b", "policy": policy, "rounds": rounds, "upload": "auto", "download": "auto"}
    text = "[task]\n" + "".join(
        f'{key} = "{value}"\n' if isinstance(value, str) else f"{key} = {value}\n"
        for key, value in (keys | task).items()
    )
    text += f"[annealing]\nbytes_per_device_per_round = {per_round}\n"
    return parse_config(text.encode(), path=Path("emberlora.toml"))


def picked(config: Config, bundle: Bundle) -> tuple[str, str]:
    task = with_budget(config, bundle.manifest).task
    return task.upload, task.download


def least_for_all(wide: Bundle, upload: str, download: str) -> int:
    """The smallest budget with which a policy at these bits has rank 1 everywhere, found by trying."""
    low, high = 1, 10**6
    while low < high:
        middle = (low + high) // 2
        config = config_of(per_round=middle, upload=upload, download=download)
        try:
            settings = with_budget(config, wide.manifest).annealing
        except ConfigError:
            low = middle + 1
            continue
        if settings.budget_end * wide.manifest.r_max >= 1 - 1e-9:
            high = middle
        else:
            low = middle + 1
    return low


def test_auto_is_the_most_precise_that_leaves_every_module_a_rank(wide: Bundle) -> None:
    """Both ends, and each threshold from either side."""
    pairs = [("float32", "float32"), ("int8", "float32"), ("int8", "int8"), ("int4", "int8")]
    assert picked(config_of(per_round=10**9), wide) == pairs[0]
    thresholds = [least_for_all(wide, *pair) for pair in pairs]
    assert thresholds == sorted(thresholds, reverse=True)
    for threshold, pair, coarser in zip(thresholds, pairs, pairs[1:], strict=False):
        assert picked(config_of(per_round=threshold), wide) == pair
        assert picked(config_of(per_round=threshold - 1), wide) == coarser
    assert picked(config_of(per_round=thresholds[-1]), wide) == ("int4", "int8")
    assert picked(config_of(per_round=thresholds[-1] - 1), wide) == ("int4", "int8")  # there is no other left


def test_auto_respects_what_was_asked_for(wide: Bundle) -> None:
    for fixed in ORDER:
        upload, download = picked(config_of(per_round=6000, download=fixed), wide)
        assert download == fixed
        assert ORDER.index(download) <= ORDER.index(upload)
        upload, download = picked(config_of(per_round=8000, upload=fixed), wide)
        assert upload == fixed
        assert ORDER.index(download) <= ORDER.index(upload)


@pytest.mark.parametrize("key", ["bytes_per_device_per_round", "total_bytes"])
@pytest.mark.parametrize("policy", BUDGETED)
def test_too_small_a_budget_names_the_least(bundle: Bundle, key: str, policy: str) -> None:
    """With as many bytes as the message says it works, with one fewer it does not."""

    def settle(amount: int) -> Config:
        config = config_of(per_round=1, policy=policy, rounds=7)
        annealing = msgspec.structs.replace(config.annealing, bytes_per_device_per_round=None)
        annealing = msgspec.structs.replace(annealing, **{key: amount})
        return with_budget(msgspec.structs.replace(config, annealing=annealing), bundle.manifest)

    with pytest.raises(
        ConfigError, match=rf"annealing.{key} \(1\) .* task.policy \({policy}\): .* least \d+"
    ) as caught:
        settle(1)
    least = int(str(caught.value).partition("at least ")[2].split()[0])
    settled = settle(least)
    assert with_budget(settled, bundle.manifest) == settled
    with pytest.raises(ConfigError, match=f"at least {least} "):
        settle(least - 1)


@pytest.mark.parametrize("policy", BUDGETED)
async def test_a_task_stays_within_its_bytes(tmp_path: Path, session: aiohttp.ClientSession, policy: str) -> None:
    """Everything a device of every round sends and fetches, and the plans; and replay makes the plans again."""
    budget, rounds = 5200, 8
    wide = make_bundle(tmp_path / "bundle", slots=WIDE, r_max=4)
    site = Site.make(
        tmp_path,
        bundle=wide,
        policy=policy,
        rounds=rounds,
        devices_per_round=1,
        upload="int4",
        download="int8",
        annealing={"total_bytes": budget * rounds, "initiating_rounds": 0, "final_rounds": 1},
    )
    await site.start()
    try:
        one = await site.device(session, "one")
        signed = await one.plan()
        spent, lives = 0, []
        while signed is not None and signed.plan.state != "finished":
            plan = signed.plan
            assert plan.quantisation
            assert plan.quantisation.bits == 4
            layout = plan_layout(wide, plan)
            steps = np.repeat(plan.quantisation.steps, layout.sizes)
            values = np.sign(values_for(site, signed, plan.round)) * steps
            sealed = one.seal(signed, one.frame(signed, values))
            assert (await one.put(signed, sealed)).status == 201
            spent += len(signed.data) + len(sealed)
            lives.append(sum(m.trained_rank for m in plan.modules if m.alive))
            signed = await one.plan(after=plan.round)
            assert signed is not None
            patch = await one.patch(signed.plan.round, since=plan.round, plain=True)
            assert patch.status == 200
            spent += len(patch.body)
        assert len(lives) == rounds
        assert budget * rounds * 0.4 < spent <= budget * rounds
        assert min(lives) < 4 * wide.manifest.r_max  # it did take something away
    finally:
        await site.close()
    found = await replay(site)
    assert found.exit_code == 0, found.output
    assert found.stdout.count("as signed") == rounds
