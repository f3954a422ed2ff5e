"""What has one seed: methods with one thing changed, unlike splits, and the runs of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.federation.lines import Key
from bench.federation.methods import FULL_MODEL, METHODS, Share, Table, merged
from bench.federation.running import Run

OURS, VARIED = "annealed-kill-revive", "small"
INGREDIENTS = (
    "annealing",
    "depth",
    "killing",
    "reviving",
    "initiating",
    "quantisation",
    "remembering",
    "free-start",
    "late-steps",
)


@dataclass(frozen=True)
class Variant:
    """One thing changed.

    Attributes:
        about: What it does, a line for people.
        extra: Tables over the method's config.
        tiers: That devices take, in turn.
        remember: Whether they keep what frozen blocks make of examples.
        methods: That it is run with, beside ``annealed-kill-revive``.
        own: Further keys of ``annealed-kill-revive``.
    """

    about: str
    extra: Mapping[str, Table] = field(default_factory=dict)
    tiers: tuple[int, ...] = (0,)
    remember: bool = True
    methods: tuple[str, ...] = ()
    own: Mapping[str, Table] = field(default_factory=dict)


# By what each goes without.
VARIANTS: Mapping[str, Variant] = {
    "annealing": Variant(
        "as many bytes in every round, at the temperature of the first", {"task": {"policy": "kill-revive"}}
    ),
    "depth": Variant("all blocks to the end", {"annealing": {"depth_start": 1.0, "depth_end": 1.0}}),
    "killing": Variant("ranks fall in place of modules", {"task": {"policy": "anneal"}}),
    "reviving": Variant("what is dead stays dead", {"annealing": {"temperature_start": 1e-9, "temperature_end": 1e-9}}),
    "initiating": Variant(
        "the budget cools from the first round", {"annealing": {"initiating_rounds": 0, "initiating_mu": 0.0}}
    ),
    "quantisation": Variant(  # with the bytes that about as many values as the small budget's take in float32
        "float32 both ways, with the bytes of as many values",
        {
            "task": {"upload": "float32", "download": "float32"},
            "annealing": {"bytes_per_device_per_round": Share(0.123)},
        },
    ),
    "remembering": Variant("devices compute frozen blocks anew in every round", remember=False),
    "free-start": Variant(
        "five initiating rounds in which devices are held to the round's start (FedProx, mu 0.05)",
        {"annealing": {"initiating_rounds": 5, "initiating_mu": 0.05}},
    ),
    "late-steps": Variant(
        "a device trains no longer in a round what moves less than 0.3 of the mean there",
        {"training": {"local_kill": 0.3}},
    ),
    "frozen-head": Variant(
        "the head is trained and sent, too, with three times the bytes: the head alone takes more than the usual ones",
        {"task": {"head": "trained"}},
        methods=("lora-r8",),
        own={"annealing": {"bytes_per_device_per_round": Share(1 / 20)}},
    ),
    "strong-devices": Variant(
        "a third of the devices trains all blocks, a third the upper half, a third the last one",
        {"tiers": {"enabled": True}},
        tiers=(0, 1, 2),
        methods=("lora-r8",),
    ),
}
_UNLIKE: tuple[float | None, ...] = (0.01, None)
_SEED, _DATASET, _ALPHA = 0, "clinc150", 0.1


def variant_run(key: Key) -> Run:
    """The run of a variant, or of a method as it is.

    Args:
        key: ``without`` is "" or a name of :data:`VARIANTS`.
    """
    variant = VARIANTS[key.without] if key.without else Variant("as it is")
    extra = merged(variant.extra, variant.own) if key.method == OURS else variant.extra
    return Run(key, extra, variant.tiers, variant.remember)


def one_seed() -> list[Run]:
    """Every run that is made with one seed, but those of a data set that has only one."""
    keys = [_key(method) for method in ("ffa-r8", FULL_MODEL)]
    for name, variant in VARIANTS.items():
        keys += [_key(OURS, VARIED, name), *(_key(method, "", name) for method in variant.methods)]
    for alpha in _UNLIKE:
        for method in ("lora-r8", "lora-r1", OURS):
            keys += [_key(method, budget, alpha=alpha) for budget in METHODS[method].budgets]
    return [variant_run(key) for key in keys]


def _key(method: str, budget: str = "", without: str = "", alpha: float | None = _ALPHA) -> Key:
    return Key(_DATASET, alpha, _SEED, method, budget, without, False)
