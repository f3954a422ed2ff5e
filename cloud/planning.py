"""From config, bundle and a policy's choice to the plan of a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from cloud.aggregate import (
    component_movement,
    largest_changes,
    module_energies,
    module_movement,
    rms_changes,
    with_ranks,
)
from cloud.config import Config
from cloud.errors import ConfigError
from cloud.keys import PlanKeys
from cloud.measuring import (
    measures,
    measuring_devices,
    measuring_layout,
    measuring_problems,
    measuring_rounds,
    measuring_rules,
    training_round,
)
from cloud.planner import Choice, PastRound, Situation, choose, plan_tiers
from cloud.rounds import RoundRules, TaskState
from cloud.store import RoundRecord
from edge_runtime import wire
from edge_runtime.bundle import Array, Bundle, adapter_ranks
from edge_runtime.wire.plan import SCHEMA


@dataclass(frozen=True)
class Adapter:
    """An adapter file by what a plan says of it."""

    digest: str
    bytes: int


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan was made from besides config, bundle and history; kept with the plan, so that it can be made again.

    Attributes:
        ranks: Of the adapter before the plan, by module.
        energies: Singular values of what every module adds to its layer, falling.
        moved: By how much the round before moved what every module adds, a Frobenius norm; empty in the first round.
        largest: The largest absolute mean change of every tensor that the round before moved.
        components: By how much it moved each component of every module that moved; four digits.
        idle: By module, the components that it was to train and too few devices carried.
        rms: The root mean square of the mean changes of every tensor that the round before moved, four digits; empty
            in what was kept before updates could be ternary.
    """

    ranks: dict[str, int]
    energies: dict[str, tuple[float, ...]]
    moved: dict[str, float] = {}
    largest: dict[str, float] = {}
    components: dict[str, tuple[float, ...]] = {}
    idle: dict[str, tuple[int, ...]] = {}
    rms: dict[str, float] = {}


@dataclass(frozen=True)
class OpenedRound:
    """A stored round's plan, its signature checked, and what it was made from."""

    plan: wire.Plan
    evidence: Evidence


def gather_evidence(
    bundle: Bundle, tensors: dict[str, Array], before: dict[str, Array] | None, idle: dict[str, tuple[int, ...]]
) -> Evidence:
    """What a policy may know of an adapter, and of what a round changed: ``before`` has the same ranks."""
    manifest = bundle.manifest
    evidence = Evidence(adapter_ranks(manifest, tensors), module_energies(manifest, tensors))
    if before is None:
        return evidence
    moved, largest = module_movement(manifest, before, tensors), largest_changes(before, tensors)
    components = component_movement(manifest, before, tensors)
    rms = rms_changes({name: before[name] for name in largest}, tensors)
    rms = {name: float(f"{change:.4g}") for name, change in rms.items()}
    return msgspec.structs.replace(evidence, moved=moved, largest=largest, components=components, idle=idle, rms=rms)


def past_rounds(opened: Sequence[OpenedRound], current: Evidence) -> tuple[PastRound, ...]:
    """What a policy sees of the rounds before.

    Args:
        opened: Every applied round, in order; those that measured are left out.
        current: What the plan is to be made from now; it knows what the last round moved.
    """
    after = [*(round_.evidence for round_ in opened[1:]), current]
    return tuple(
        PastRound(
            round_.plan.modules,
            made.moved,
            components=made.components,
            largest=made.largest,
            training=round_.plan.training,
            idle=made.idle,
            rms=made.rms,
        )
        for round_, made in zip(opened, after, strict=False)  # before the first round there is nothing to pair
        if round_.plan.state == "train"
    )


def open_round(record: RoundRecord, keys: PlanKeys) -> OpenedRound:
    """Read a stored round; one of ``keys`` signed its plan."""
    return OpenedRound(keys.open(record.plan).plan, read_evidence(record))


def read_evidence(record: RoundRecord) -> Evidence:
    """What a stored plan was made from."""
    return msgspec.json.decode(record.evidence, type=Evidence)


def check_fit(config: Config, bundle: Bundle) -> None:
    """Demand that the config asks only for what the bundle has.

    Raises:
        ConfigError: naming the key and the bundle's bound.
    """
    manifest, task, training = bundle.manifest, config.task, config.training
    if task.rank is not None and task.rank > manifest.r_max:
        raise ConfigError(f"task.rank ({task.rank}) must not exceed the bundle's r_max ({manifest.r_max})")
    if training.max_tokens is not None and training.max_tokens > manifest.text.max_tokens:
        raise ConfigError(
            f"training.max_tokens ({training.max_tokens}) must not exceed the bundle's ({manifest.text.max_tokens})"
        )
    if training.products == "int8" and not all(kind.fast for kind in manifest.kinds):
        raise ConfigError(f"training.products is int8, which a bundle of base {manifest.base} has not")
    if "head" in task.personal and manifest.head.module is None:
        raise ConfigError("task.personal has the head, and the bundle's model has none to train")
    problems = measuring_problems(config, manifest)
    if problems:
        raise ConfigError(problems[0])


def round_rules(config: Config, round_: int) -> RoundRules:
    """The state machine's part of the config, for a round."""
    task = config.task
    devices = measuring_devices(config) if measures(config, round_) else task.devices_per_round
    return RoundRules(all_rounds(config), devices, task.min_devices, task.round_deadline_s)


def all_rounds(config: Config) -> int:
    """Rounds that train, and those before them."""
    return measuring_rounds(config) + config.task.rounds


def update_rules(config: Config, round_: int) -> wire.UpdateRules:
    """Bounds that keep the sums of a round exact."""
    if measures(config, round_):
        return measuring_rules(config)
    task = config.task
    return wire.UpdateRules(
        weight_cap=task.weight_cap,
        max_devices=task.devices_per_round,
        max_norm=UNSET if task.max_update_norm is None else task.max_update_norm,
    )


def first_adapter(config: Config, bundle: Bundle) -> dict[str, Array]:
    """The bundle's adapter at the config's rank."""
    ranks = dict.fromkeys(bundle.manifest.module_names, config.task.rank or bundle.manifest.r_max)
    return with_ranks(bundle.manifest, bundle.initial_adapter(), ranks, seed=(config.task.seed, 0))


def planned_adapter(
    config: Config, bundle: Bundle, state: TaskState, choice: Choice, tensors: dict[str, Array]
) -> dict[str, Array]:
    """The adapter at the ranks that were chosen."""
    ranks = {module.name: module.rank for module in choice.modules}
    return with_ranks(bundle.manifest, tensors, ranks, seed=(config.task.seed, state.round))


def choose_modules(
    config: Config, bundle: Bundle, state: TaskState, evidence: Evidence, past: tuple[PastRound, ...]
) -> Choice:
    """What the configured policy wants trained, given the adapter; nothing at the end and while measuring."""
    ranks = evidence.ranks
    if state.phase == "finished" or measures(config, state.round):
        names = bundle.manifest.module_names
        return Choice(tuple(wire.ModulePlan(name=name, rank=ranks[name], alive="") for name in names), head_alive=False)
    situation = Situation(
        manifest=bundle.manifest,
        ranks=ranks,
        aggregation=config.task.aggregation,
        round=training_round(config, state.round),
        rounds=config.task.rounds,
        seed=config.task.seed,
        head_frozen=not config.task.shares_head,
        annealing=config.annealing,
        full_rank=config.task.rank,
        energies=evidence.energies,
        past=past,
    )
    return choose(config.task.policy, situation)


def make_plan(
    config: Config, bundle: Bundle, state: TaskState, *, choice: Choice, adapter: Adapter, round_key: str
) -> wire.Plan:
    """The plan of a state; ``round_key`` is the public key in hex, empty when the task is finished."""
    task = config.task
    working: Literal["measure", "train"] = "measure" if measures(config, state.round) else "train"
    return wire.Plan(
        schema=SCHEMA,
        task=task.name,
        round=state.round,
        rounds=all_rounds(config),
        state="finished" if state.phase == "finished" else working,
        bundle=bundle.digest,
        adapter=adapter.digest,
        adapter_bytes=adapter.bytes,
        modules=choice.modules,
        head_alive=choice.head_alive,
        training=training_of(config, bundle, state.round, choice),
        update=update_rules(config, state.round),
        seed=task.seed,
        deadline=state.deadline,
        round_key=round_key,
        min_examples=task.min_examples,
        personal=personal_of(config, state.round),
        tiers=tiers_of(config, bundle, state, choice),
    )


def personal_of(config: Config, round_: int) -> tuple[wire.Personal, ...] | UnsetType:
    """What devices train and keep in a round: nothing while they measure."""
    parts: tuple[wire.Personal, ...] = ("head", "B")
    found = tuple(part for part in parts if part in config.task.personal)
    return UNSET if measures(config, round_) or not found else found


def tiers_of(config: Config, bundle: Bundle, state: TaskState, choice: Choice) -> tuple[wire.Tier, ...] | UnsetType:
    """What weaker devices carry in a round that trains."""
    trains = state.phase != "finished" and not measures(config, state.round)
    return plan_tiers(config.tiers, bundle.manifest, choice.modules) if trains else UNSET


def training_of(config: Config, bundle: Bundle, round_: int, choice: Choice) -> wire.Training:
    """How devices train in a round."""
    training = config.training
    share = wire.rate_share(training.lr_schedule, training_round(config, round_) / max(config.task.rounds - 1, 1))
    return wire.Training(
        batch_size=training.batch_size,
        max_tokens=training.max_tokens or bundle.manifest.text.max_tokens,
        lr_a=training.lr_a * share,
        lr_b=training.lr_b * share,
        lr_head=training.lr_head * share,
        steps=training.steps,
        epochs=training.epochs or (1 if training.steps is None else None),
        weight_decay=training.weight_decay,
        mu=training.mu if choice.mu is None else choice.mu,
        clip_norm=training.clip_norm,
        local_kill=UNSET if training.local_kill is None else training.local_kill,
        example_share=UNSET if training.example_share == 1 else training.example_share,
        products="int8" if training.products == "int8" else UNSET,
    )


def plan_layout(bundle: Bundle, plan: wire.Plan) -> wire.Layout:
    """The layout of updates that carry the whole plan."""
    return plan_layouts(bundle, plan)[0]


def plan_layouts(bundle: Bundle, plan: wire.Plan) -> tuple[wire.Layout, ...]:
    """The layouts of updates to a plan, of its tiers in order."""
    manifest = bundle.manifest
    if plan.state == "measure":
        return (measuring_layout(manifest),)
    return wire.tier_layouts(plan, features=manifest.features, places=manifest.places, head=manifest.head_shapes)
