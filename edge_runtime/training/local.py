"""Training on local data with given settings: the loop around the engine's step, the same with and without a server."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from edge_runtime.data import Dataset, evaluation_batches, steps_per_epoch, training_batches
from edge_runtime.engine.adamw import AdamW
from edge_runtime.engine.errors import DivergedError
from edge_runtime.engine.interface import Engine, Score
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.wire import Training

OnStep = Callable[[int, int, float], None]  # step from 1, steps, mean loss of the batch in nats


@dataclass(frozen=True)
class Trained:
    """What a local training did. Losses are means over the first and the last quarter of the steps, in nats."""

    steps: int
    loss_start: float
    loss_end: float
    seconds: float


def planned_steps(training: Training, dataset: Dataset) -> int:
    """Optimizer steps the settings ask for on this dataset."""
    if training.steps is not None:
        return training.steps
    return (training.epochs or 1) * steps_per_epoch(dataset, training.batch_size)


def train(
    engine: Engine,
    parameters: AdapterParameters,
    dataset: Dataset,
    training: Training,
    *,
    rng: np.random.Generator,
    on_step: OnStep | None = None,
) -> Trained:
    """Train the alive parameters in place.

    Args:
        engine: The engine; it is given ``parameters``.
        parameters: Changed in place, alive tensors only.
        dataset: Local examples.
        training: Steps or epochs, batch size, learning rates.
        rng: Order of the examples.
        on_step: Called after every step; may raise to stop.

    Raises:
        DivergedError: the loss is no longer finite; the parameters are those of the last good step.
    """
    steps = planned_steps(training, dataset)
    engine.use(parameters)
    optimizer = AdamW(parameters, training)
    losses: list[float] = []
    began = time.perf_counter()
    for batch in training_batches(dataset, training.batch_size, steps=steps, rng=rng):
        gradients = engine.gradients(batch)
        loss = gradients.score.loss
        if not math.isfinite(loss):
            raise DivergedError(f"training: step {len(losses) + 1}: the loss is {loss}: lower the learning rates")
        optimizer.step(gradients.tensors)
        losses.append(loss)
        if on_step is not None:
            on_step(len(losses), steps, loss)
    quarter = max(1, len(losses) // 4)
    return Trained(
        len(losses),
        float(np.mean(losses[:quarter])),
        float(np.mean(losses[-quarter:])),
        time.perf_counter() - began,
    )


def evaluate(engine: Engine, dataset: Dataset, *, batch_size: int = 32) -> Score:
    """Loss and correct predictions over a whole dataset with the adapter in use."""
    return add_scores(engine.evaluate(batch) for batch in evaluation_batches(dataset, batch_size))


def add_scores(scores: Iterable[Score]) -> Score:
    """The sum of scores; the empty sum is the zero score."""
    return sum(scores, Score())
