"""Why each round trained what it did: every plan with the scores it was made from, what it cost, and what it moved."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

import msgspec

from cloud import planning
from cloud.budgeting import with_budget
from cloud.config import Config
from cloud.kept import Kept
from cloud.measuring import training_round
from cloud.planner import Annealing
from cloud.planner.annealing import budget_share, temperature
from cloud.planner.scores import scores
from edge_runtime import wire
from edge_runtime.wire.quantisation import payload_bytes


class ModuleLog(msgspec.Struct, frozen=True):
    """One module in one round.

    Attributes:
        name: As in the bundle.
        block: Number of its block, the lowest first.
        slot: Its name within the block.
        alive: Factors trained, "" for a dead module.
        rank: Components in the forward pass.
        trained: Of these, how many were trained; 0 for a dead module.
        score: That the policy saw when it made the plan; None before the module was ever alive.
        moved: Frobenius norm of what the round's mean changed of s·B·A; None while the round is open.
        bytes: Of an update, for this module.
    """

    name: str
    block: int
    slot: str
    alive: str
    rank: int
    trained: int
    score: float | None
    moved: float | None
    bytes: int


class RoundLog(msgspec.Struct, frozen=True):
    """One round.

    Attributes:
        round: From 0.
        state: "train", or "measure" for the round that measures class means.
        temperature: Of revival; None where the policy has none.
        budget_share: Of the adapter that might be alive; None where the policy has no budget.
        update_bytes: Of one update, before it is sealed.
        modules: In the bundle's order.
    """

    round: int
    state: Literal["train", "measure"]
    temperature: float | None
    budget_share: float | None
    update_bytes: int
    modules: tuple[ModuleLog, ...]

    @property
    def alive(self) -> int:
        """How many modules were alive."""
        return sum(bool(module.alive) for module in self.modules)


def plan_log(config: Config, kept: Kept) -> list[RoundLog]:
    """Every round of a task whose plan asked for work, in order."""
    config = with_budget(config, kept.bundle.manifest)
    found = []
    opened = [planning.open_round(record, kept.keys) for record in kept.records]
    for number, round_ in enumerate(opened):
        plan, evidence = round_.plan, round_.evidence
        if plan.state == "finished":
            continue
        past = planning.past_rounds(opened[:number], evidence)
        known = scores(past, _component_sizes(kept))
        moved = opened[number + 1].evidence.moved if number + 1 < len(opened) else {}
        layout = planning.plan_layout(kept.bundle, plan)
        heat, share = _cooling(config, training_round(config, plan.round))
        found.append(
            RoundLog(
                round=plan.round,
                state=plan.state,
                temperature=heat if plan.state == "train" else None,
                budget_share=share if plan.state == "train" else None,
                update_bytes=layout.frame_bytes,
                modules=_modules(kept, plan, layout, known, moved),
            )
        )
    return found


def _component_sizes(kept: Kept) -> dict[str, int]:
    return {name: sum(features) for name, features in kept.bundle.manifest.features.items()}


def _cooling(config: Config, round_: int) -> tuple[float | None, float | None]:
    """Temperature and budget share of a training round, as the policy has them."""
    settings: Annealing = config.annealing
    rounds, policy = config.task.rounds, config.task.policy
    share = budget_share(settings, round_, rounds)
    if policy == "anneal":
        return None, share
    if policy == "annealed-kill-revive":
        return temperature(settings, round_, rounds), share
    if policy == "lora-a2":
        return None, min(1.0, settings.budget_end)
    if policy == "kill-revive":
        initiating = round_ < settings.initiating_rounds
        return settings.temperature_start, min(1.0, settings.budget_start if initiating else settings.budget_end)
    return None, None


def _modules(
    kept: Kept, plan: wire.Plan, layout: wire.Layout, known: Mapping[str, float], moved: Mapping[str, float]
) -> tuple[ModuleLog, ...]:
    sizes = dict(zip((name for name, _ in layout.blocks), layout.sizes, strict=True))
    places = {module.name: module for module in kept.bundle.manifest.modules}
    return tuple(
        ModuleLog(
            name=module.name,
            block=places[module.name].block,
            slot=places[module.name].slot,
            alive=module.alive,
            rank=module.rank,
            trained=module.trained_rank if module.alive else 0,
            score=known.get(module.name),
            moved=moved.get(module.name),
            bytes=sum(
                _bytes(sizes[name], layout)
                for name in (f"{module.name}.lora_{factor.lower()}" for factor in module.alive)
            ),
        )
        for module in plan.modules
    )


def _bytes(values: int, layout: wire.Layout) -> int:
    """What so many values take of an update; where it holds some of all, what is theirs if all modules have as many."""
    return payload_bytes([values], layout.quantisation) if layout.quantisation else 4 * values


def share_of_movement(round_: RoundLog, part: float) -> float | None:
    """The smallest share of the modules that made this part of a round's movement; None when nothing moved."""
    moved = sorted((module.moved or 0.0 for module in round_.modules), reverse=True)
    if not any(moved):
        return None
    reached = (made >= part * sum(moved) for made in itertools.accumulate(moved))
    return (1 + list(reached).index(True)) / len(moved)
