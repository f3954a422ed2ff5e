"""Training on local data with given settings: the loop around the engine's step, the same with and without a server."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.data import Dataset, evaluation_batches, steps_per_epoch, training_batches
from edge_runtime.engine.adamw import AdamW
from edge_runtime.engine.errors import DivergedError
from edge_runtime.engine.interface import Engine, Score
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.engine.remembered import RememberedHidden
from edge_runtime.training.accumulate import MICRO_TOKENS, accumulate, micro_batches
from edge_runtime.training.stillness import Stillness, window_steps
from edge_runtime.wire import Schedule, Training, rate_share

OnStep = Callable[[int, int, float], None]  # step from 1, steps, mean loss of the batch in nats
OnStill = Callable[[int, frozenset[str]], None]  # step from 1, modules that are trained no longer from then on


@dataclass(frozen=True)
class Trained:
    """What a local training did.

    Attributes:
        steps: Of the optimizer.
        loss_start: Mean over the first quarter of the steps, in nats.
        loss_end: The same over the last quarter.
        seconds: All of it took.
        spared: Tokens for which the lowest blocks were not computed, by how many blocks these were.
        skipped: Steps of modules that were left out because the module stood still.
    """

    steps: int
    loss_start: float
    loss_end: float
    seconds: float
    spared: Mapping[int, int] = field(default_factory=dict)
    skipped: int = 0


@dataclass(frozen=True)
class Course:
    """What is learned and how.

    Attributes:
        dataset: Local examples.
        training: Steps or epochs, batch size, learning rates.
        rng: Order of the examples.
        schedule: How the learning rates fall over the steps; a plan's rates are constant within its round.
        micro_tokens: Tokens that go through the model at once, padding included; larger batches are divided.
        remembered: What the frozen blocks make of examples. It serves one training, which closes it.
    """

    dataset: Dataset
    training: Training
    rng: np.random.Generator
    schedule: Schedule = "constant"
    micro_tokens: int = MICRO_TOKENS
    remembered: RememberedHidden | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps the settings ask for on this dataset."""
        if self.training.steps is not None:
            return self.training.steps
        return (self.training.epochs or 1) * steps_per_epoch(self.dataset, self.training.batch_size)


def train(
    engine: Engine,
    parameters: AdapterParameters,
    course: Course,
    *,
    on_step: OnStep | None = None,
    on_still: OnStill | None = None,
) -> Trained:
    """Train the alive parameters in place; where the settings ask for it, those that stand still no longer.

    Args:
        engine: The engine; it is given ``parameters``.
        parameters: Changed in place, alive tensors only.
        course: Data, settings and order.
        on_step: Called after every step; may raise to stop.
        on_still: Called when modules stand still.

    Raises:
        DivergedError: the loss is no longer finite; the parameters are those of the last good step.
    """
    with course.remembered or contextlib.nullcontext():
        return _train(engine, parameters, course, on_step, on_still)


def _train(
    engine: Engine,
    parameters: AdapterParameters,
    course: Course,
    on_step: OnStep | None,
    on_still: OnStill | None,
) -> Trained:
    steps, training = course.steps, course.training
    an_epoch = steps_per_epoch(course.dataset, training.batch_size)
    memory = course.remembered
    remembered = memory if memory and (steps > an_epoch or memory.lasting) else None  # not what is never seen again
    engine.use(parameters, remembered)
    optimizer = AdamW(parameters, training)
    stillness = Stillness(parameters, training, window=window_steps(an_epoch))
    losses: list[float] = []
    began = time.perf_counter()
    for batch in training_batches(course.dataset, training.batch_size, steps=steps, rng=course.rng):
        gradients = accumulate(engine, batch, course.micro_tokens)
        loss = gradients.score.loss
        if not math.isfinite(loss):
            raise DivergedError(f"training: step {len(losses) + 1}: the loss is {loss}: lower the learning rates")
        share = rate_share(course.schedule, len(losses) / max(steps - 1, 1))
        optimizer.step(gradients.tensors, share=share)
        losses.append(loss)
        if on_step is not None:
            on_step(len(losses), steps, loss)
        still = stillness.after_step(share)
        if still and len(losses) < steps:
            parameters.freeze(stillness.tensors(still))
            optimizer.freeze(parameters.frozen)
            engine.use(parameters, remembered)
            if on_still is not None:
                on_still(len(losses), still)
    quarter = max(1, len(losses) // 4)
    return Trained(
        len(losses),
        float(np.mean(losses[:quarter])),
        float(np.mean(losses[-quarter:])),
        time.perf_counter() - began,
        dict(memory.spared) if memory else {},
        stillness.skipped,
    )


def evaluate(engine: Engine, dataset: Dataset, *, batch_size: int = 32, micro_tokens: int = MICRO_TOKENS) -> Score:
    """Loss and correct predictions over a whole dataset with the adapter in use."""
    return add_scores(
        engine.evaluate(part)
        for batch in evaluation_batches(dataset, batch_size)
        for part in micro_batches(batch, micro_tokens)
    )


def add_scores(scores: Iterable[Score]) -> Score:
    """The sum of scores; the empty sum is the zero score."""
    return sum(scores, Score())
