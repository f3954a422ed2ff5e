"""Plans made again from what was kept of a task, and compared with those that were signed.

A policy is a pure function of config, bundle, history and the evidence kept with each plan. So anyone with the data
folder can check that the plans devices obeyed are those the config asks for, and a change of a policy shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from cloud import planning
from cloud.budgeting import with_budget
from cloud.config import UPLOAD_BITS, Config
from cloud.kept import read_kept
from cloud.keys import PlanKeys
from cloud.quantising import with_quantisation
from cloud.rounds import TaskState
from cloud.store import RoundRecord
from edge_runtime import wire
from edge_runtime.bundle import Bundle

_UPLOADS = {bits: upload for upload, bits in UPLOAD_BITS.items()}


class ReplayedRound(msgspec.Struct, frozen=True):
    """One plan beside what the config asks for.

    Attributes:
        round: From 0.
        parameters: Those of the signed plan's modules that are trained, without the head.
        lowest_rank: Of the signed plan.
        highest_rank: The same.
        state: Of the signed plan: ``measure`` or ``train``.
        differences: What the replayed plan has otherwise, in words; empty when they agree.
    """

    round: int
    parameters: int
    lowest_rank: int
    highest_rank: int
    state: str
    differences: tuple[str, ...]


async def replay(config: Config) -> list[ReplayedRound]:
    """Every plan of a task made again; the server may run meanwhile.

    Raises:
        DataError: the data folder holds no task, or one of another version or bundle.
        BundleError: the bundle cannot be opened.
        ConfigError: the budget in bytes is too small.
    """
    kept = await read_kept(config)
    config = with_budget(config, kept.bundle.manifest)
    return list(_replayed(config, kept.bundle, kept.records, kept.keys))


def _replayed(
    config: Config, bundle: Bundle, records: Sequence[RoundRecord], keys: PlanKeys
) -> Iterator[ReplayedRound]:
    features = bundle.manifest.features
    opened = [planning.open_round(record, keys) for record in records]
    for number, round_ in enumerate(opened):
        plan, evidence = round_.plan, round_.evidence
        if plan.state == "finished":
            continue
        state = TaskState(planning.round_rules(config, plan.round), plan.round, "open", plan.deadline)
        past = planning.past_rounds(opened[:number], evidence)
        choice = planning.choose_modules(config, bundle, state, evidence, past)
        training = planning.training_of(config, bundle, plan.round, choice)
        tiers = planning.tiers_of(config, bundle, state, choice)
        again = msgspec.structs.replace(
            plan,
            modules=choice.modules,
            head_alive=choice.head_alive,
            training=training,
            personal=planning.personal_of(config, plan.round),
            tiers=tiers,
            update=msgspec.structs.replace(plan.update, max_norm=planning.update_rules(config, plan.round).max_norm),
        )
        again = with_quantisation(config, bundle, again, past)
        sides = [(module.alive, module.trained_rank, features[module.name]) for module in plan.modules]
        yield ReplayedRound(
            round=plan.round,
            parameters=sum(rank * (("A" in alive) * size[0] + ("B" in alive) * size[1]) for alive, rank, size in sides),
            lowest_rank=min(module.rank for module in plan.modules),
            highest_rank=max(module.rank for module in plan.modules),
            state=plan.state,
            differences=(*_differences(plan, again), *_range_differences(bundle, plan, again)),
        )


def _differences(signed: wire.Plan, replayed: wire.Plan) -> Iterator[str]:
    if signed.head_alive != replayed.head_alive:
        yield f"head: signed {_alive(signed.head_alive)}, replayed {_alive(replayed.head_alive)}"
    if signed.personal_parts != replayed.personal_parts:
        yield f"personal: signed {_parts(signed)}, replayed {_parts(replayed)}"
    if signed.training.mu != replayed.training.mu:
        yield f"mu: signed {signed.training.mu:g}, replayed {replayed.training.mu:g}"
    if signed.update != replayed.update:
        yield f"norm: signed {_bound(signed)}, replayed {_bound(replayed)}"
    if signed.tiers != replayed.tiers:
        yield f"tiers: signed {_tiers(signed)}, replayed {_tiers(replayed)}"
    for ours, wanted in zip(signed.modules, replayed.modules, strict=True):
        if ours != wanted:
            yield f"{ours.name}: signed {_module(ours)}, replayed {_module(wanted)}"


def _range_differences(bundle: Bundle, signed: wire.Plan, replayed: wire.Plan) -> Iterator[str]:
    ours, theirs = (_ranges(bundle, plan) for plan in (signed, replayed))
    bits = [_UPLOADS[plan.quantisation.bits] if plan.quantisation else "float32" for plan in (signed, replayed)]
    if bits[0] != bits[1]:
        yield f"upload: signed {bits[0]}, replayed {bits[1]}"
        return
    if (densities := [_density(plan) for plan in (signed, replayed)])[0] != densities[1]:
        yield f"upload density: signed {densities[0]:g}, replayed {densities[1]:g}"
    for name, range_ in ours.items():
        if theirs.get(name, range_) != range_:  # what only one of them trains is named already
            yield f"{name}: signed range {range_:g}, replayed {theirs[name]:g}"


def _ranges(bundle: Bundle, plan: wire.Plan) -> dict[str, float]:
    if not plan.quantisation:
        return {}
    blocks = planning.plan_layout(bundle, plan).blocks
    return {name: range_ for (name, _), range_ in zip(blocks, plan.quantisation.ranges, strict=True)}


def _density(plan: wire.Plan) -> float:
    known = plan.quantisation and plan.quantisation.density
    return known or 1.0


def _tiers(plan: wire.Plan) -> str:
    return (
        "; ".join(
            " ".join(
                f"{name} {value:g}"
                for name, value in msgspec.structs.asdict(tier).items()
                if value is not msgspec.UNSET
            )
            for tier in plan.tiers or ()
        )
        or "none"
    )


def _module(module: wire.ModulePlan) -> str:
    some = "" if module.trained is msgspec.UNSET else f" components {', '.join(map(str, module.trained))}"
    return f"rank {module.rank} alive {module.alive or 'none'}{some}"


def _parts(plan: wire.Plan) -> str:
    return ", ".join(plan.personal_parts) or "nothing"


def _bound(plan: wire.Plan) -> str:
    return "any" if plan.update.max_norm is msgspec.UNSET else f"at most {plan.update.max_norm:g}"


def _alive(alive: bool) -> str:
    return "alive" if alive else "dead"
