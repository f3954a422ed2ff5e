"""What the demo trains and how: one frozen recipe a task, and the aggregator's config made from it."""

from __future__ import annotations

from typing import Literal

import msgspec


class Rates(msgspec.Struct, frozen=True):
    """Learning rates of the A factors, the B factors and the trained head."""

    a: float
    b: float
    head: float


class Cooling(msgspec.Struct, frozen=True):
    """Where the annealing ends: shares of the adapter's parameters and of the model's blocks."""

    budget: float = 0.25
    depth: float = 0.5


class Recipe(msgspec.Struct, frozen=True):
    """Everything a run depends on besides this machine's Python."""

    task: Literal["classify", "lm"]
    model: str
    packages: int
    rank: int
    max_tokens: int
    batch_size: int
    devices: int
    rounds: int
    steps: int  # optimizer steps of a device in a round
    rates: Rates
    central: Rates  # a pooled run keeps its optimizer and both factors, so smaller rates suit it
    cooling: Cooling = Cooling()
    home_share: float = 0.6  # of a package's texts at its home device
    heldout_share: float = 0.2
    max_heldout: int | None = None  # None: all of it
    seed: int = 0

    @property
    def metric(self) -> Literal["accuracy", "loss"]:
        """``accuracy`` is a fraction from 0 to 1, ``loss`` mean nats a trained token."""
        return "accuracy" if self.task == "classify" else "loss"

    @property
    def all_steps(self) -> int:
        """Optimizer steps of all devices in all rounds together."""
        return self.devices * self.rounds * self.steps


CLASSIFY = Recipe(
    task="classify",
    model="minilm",
    packages=8,
    rank=8,
    max_tokens=32,  # a docstring's first lines; the rest costs time and adds little
    batch_size=16,
    devices=4,
    rounds=12,
    steps=12,  # with 10 a seed in two came close to the bound of 0.03 below pooled training
    rates=Rates(2e-3, 5e-3, 1e-2),
    central=Rates(1e-3, 1e-3, 5e-3),
)
LM = Recipe(
    task="lm",
    model="smollm2",
    packages=8,
    rank=8,
    max_tokens=128,
    batch_size=4,
    devices=4,
    rounds=6,
    steps=5,
    rates=Rates(5e-4, 2e-3, 0.0),
    central=Rates(2e-4, 5e-4, 0.0),
    max_heldout=64,  # each costs a forward pass of the whole model in every round
)
QUICK = {"rounds": 2, "steps": 2, "max_heldout": 96}  # shows that everything works, not how well


def config_text(recipe: Recipe, *, bundle: str) -> str:
    """The aggregator's config file; ``bundle`` is relative to it."""
    return f"""\
[task]
name = "demo"
bundle = "{bundle}"
policy = "annealed-kill-revive"
aggregation = "alternate"
upload = "int8"
download = "int8"
rounds = {recipe.rounds}
rank = {recipe.rank}
devices_per_round = {recipe.devices}
min_devices = {recipe.devices}
seed = {recipe.seed}

[training]
batch_size = {recipe.batch_size}
max_tokens = {recipe.max_tokens}
steps = {recipe.steps}
lr_a = {recipe.rates.a}
lr_b = {recipe.rates.b}
lr_head = {recipe.rates.head}
lr_schedule = "cosine"

[annealing]
budget_end = {recipe.cooling.budget}
depth_end = {recipe.cooling.depth}
initiating_rounds = {min(2, recipe.rounds)}
final_rounds = {min(2, recipe.rounds - min(2, recipe.rounds))}

[server]
port = 0
"""
