"""Training on local data with given settings: the loop around the engine's step, the same with and without a server."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.data import Batch, Dataset, evaluation_batches, steps_per_epoch, training_batches
from edge_runtime.engine.adamw import AdamW
from edge_runtime.engine.errors import DivergedError
from edge_runtime.engine.interface import Engine, Score
from edge_runtime.engine.parameters import AdapterParameters, Flat
from edge_runtime.engine.remembered import RememberedHidden
from edge_runtime.training.accumulate import MICRO_TOKENS, accumulate, micro_batches
from edge_runtime.training.checkpoint import Checkpoints, Position
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
        importance: Of every example when it was last trained on, shape (examples,), see
            :class:`edge_runtime.engine.interface.Gradients`; NaN where it was not, or the engine does not say.
    """

    steps: int
    loss_start: float
    loss_end: float
    seconds: float
    importance: Flat
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
        checkpoints: Where it is kept how far the training is; None: nowhere.
        resumed: Where an interrupted training of the same course goes on; ``rng`` is as at its beginning.
    """

    dataset: Dataset
    training: Training
    rng: np.random.Generator
    schedule: Schedule = "constant"
    micro_tokens: int = MICRO_TOKENS
    remembered: RememberedHidden | None = None
    checkpoints: Checkpoints | None = None
    resumed: Position | None = None

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
        course: Data, settings and order, and where an interrupted training goes on.
        on_step: Called after every step; may raise to stop.
        on_still: Called when modules stand still.

    Raises:
        DivergedError: the loss is no longer finite; the parameters are those of the last good step.
        StoppedError: the course's checkpoints ended it after a step.
    """
    with course.remembered or contextlib.nullcontext():
        run = _Run(engine, parameters, course)
        if course.resumed is not None:
            run.resume(course.resumed)
        run.use()
        batches = training_batches(
            course.dataset, course.training.batch_size, steps=course.steps, rng=course.rng, done=run.steps
        )
        for batch in batches:
            still = run.step(batch)
            if on_step is not None:
                on_step(run.steps, course.steps, run.losses[-1])
            if still and run.steps < course.steps:
                run.freeze(still)
                if on_still is not None:
                    on_still(run.steps, still)
            if course.checkpoints is not None:
                course.checkpoints.after_step(run.position)
        return run.trained()


class _Run:
    """One training under way: what its next step follows from."""

    def __init__(self, engine: Engine, parameters: AdapterParameters, course: Course) -> None:
        an_epoch = steps_per_epoch(course.dataset, course.training.batch_size)
        memory = course.remembered
        lasts = memory is not None and (course.steps > an_epoch or memory.lasting)  # else it is never seen again
        self.losses: list[float] = []
        self._engine, self._parameters, self._course = engine, parameters, course
        self._remembered = memory if lasts else None
        self._optimizer = AdamW(parameters, course.training)
        self._stillness = Stillness(parameters, course.training, window=window_steps(an_epoch))
        self._importance = np.full(len(course.dataset), np.nan, np.float32)
        self._spared: Counter[int] = Counter()  # before it was interrupted
        self._seconds = 0.0
        self._began = time.perf_counter()

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return len(self.losses)

    def resume(self, position: Position) -> None:
        """Go on after an interrupted training's last checkpoint."""
        self.losses, self._seconds = list(position.losses), position.seconds
        self._spared.update(position.spared)
        self._importance[:] = position.importance
        self._parameters.resume(position.values)
        self._optimizer.resume(position.first, position.second, position.step)
        self._stillness.resume(position.watched)
        self._freeze(position.watched.still)

    def use(self) -> None:
        """Give the engine what is trained."""
        self._engine.use(self._parameters, self._remembered)

    def step(self, batch: Batch) -> frozenset[str]:
        """Take a step; returns the modules that stand still from now on."""
        course, done = self._course, self.steps
        gradients = accumulate(self._engine, batch, course.micro_tokens)
        loss = gradients.score.loss
        if not math.isfinite(loss):
            raise DivergedError(f"training: step {done + 1}: the loss is {loss}: lower the learning rates")
        share = rate_share(course.schedule, done / max(course.steps - 1, 1))
        self._optimizer.step(gradients.tensors, share=share)
        self.losses.append(loss)
        if gradients.importance is not None:
            self._importance[batch.examples] = gradients.importance
        return self._stillness.after_step(share)

    def freeze(self, modules: frozenset[str]) -> None:
        """Train these modules no longer."""
        self._freeze(modules)
        self.use()

    def position(self) -> Position:
        """Where the training is; the arrays are its own, and change with the next step."""
        return Position(
            values=self._parameters.flat,
            first=self._optimizer.first,
            second=self._optimizer.second,
            watched=self._stillness.watched(),
            losses=tuple(self.losses),
            seconds=self._passed(),
            importance=self._importance,
            spared=self._spared_so_far(),
        )

    def trained(self) -> Trained:
        """What was done, when it is done."""
        quarter = max(1, self.steps // 4)
        return Trained(
            self.steps,
            float(np.mean(self.losses[:quarter])),
            float(np.mean(self.losses[-quarter:])),
            self._passed(),
            self._importance,
            self._spared_so_far(),
            self._stillness.skipped,
        )

    def _freeze(self, modules: frozenset[str]) -> None:
        self._parameters.freeze(self._stillness.tensors(modules))
        self._optimizer.freeze(self._parameters.frozen)

    def _passed(self) -> float:
        return self._seconds + time.perf_counter() - self._began

    def _spared_so_far(self) -> dict[int, int]:
        memory = self._course.remembered
        return dict(self._spared + memory.spared) if memory else dict(self._spared)


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
