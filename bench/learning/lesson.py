"""One training in a process of its own: ``python -m bench.learning.lesson SETUP.json``, its outcome a line on stdout.

Both sides see the same batches of the same dataset with the same rates; only the engine and the optimizer differ.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.learning.lines import REFERENCE, System, products_of
from bench.learning.tasks import Recipe
from edge_runtime.bundle import open_bundle
from edge_runtime.data import Batch, Dataset, evaluation_batches, training_batches
from edge_runtime.engine.interface import Score
from edge_runtime.training.local import Course, add_scores, evaluate, train
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import Schedule, Training, rate_share

CHECKPOINTS = (0, 25, 50, 100, 150, 200)
_SCHEDULE: Schedule = "cosine"  # what ``emberlora edge train`` does unless told otherwise
_MEASURED_TOKENS = 1024  # a batch that torch measures: all logits of 1,024 tokens are 200 MB with 49,152 words


class Setup(msgspec.Struct, frozen=True):
    """What to train. ``model``: preset or folder of the base; ``start``: peft folder; paths as text."""

    recipe: Recipe
    system: System
    seed: int
    steps: int
    threads: int
    model: str
    bundle: str
    start: str
    train: str
    held_out: str


class Outcome(msgspec.Struct, frozen=True):
    """The held-out metric after so many steps, and the seconds of training without measuring."""

    curve: tuple[tuple[int, float], ...]
    train_s: float


class Watch:
    """Measures at the checkpoints, on a clock that stands still meanwhile."""

    def __init__(
        self,
        measure: Callable[[], float],
        checkpoints: tuple[int, ...],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._measure = measure
        self._checkpoints = checkpoints
        self._clock = clock
        self._began = clock()
        self.curve: list[tuple[int, float]] = []
        self.train_s = 0.0

    def after(self, step: int) -> None:
        """Call once before the first step, with 0, and after every step."""
        now = self._clock()
        if step:
            self.train_s += now - self._began
        if step in self._checkpoints:
            self.curve.append((step, self._measure()))
            print(f"    step {step}: {self.curve[-1][1]:.4f}", file=sys.stderr, flush=True)
        self._began = self._clock()


def checkpoints(steps: int) -> tuple[int, ...]:
    """After how many steps to measure: the usual ones, the middle of a short run, and the end."""
    usual = tuple(step for step in CHECKPOINTS if step < steps)
    return tuple(sorted({*usual, steps // 2, steps})) if steps < CHECKPOINTS[2] else (*usual, steps)


def run(setup: Setup) -> Outcome:
    """Train and measure."""
    recipe = setup.recipe
    bundle = open_bundle(Path(setup.bundle), verify=False)
    work = WorkingBundle(bundle, threads=setup.threads, products=products_of(setup.system))
    data, held_out = (
        work.dataset((Path(path),), max_tokens=recipe.max_tokens, skip_bad=False)
        for path in (setup.train, setup.held_out)
    )
    course = Course(data, recipe.training(setup.steps), np.random.default_rng(setup.seed), _SCHEDULE)
    if setup.system == REFERENCE:
        watch = _by_peft(setup, course, held_out)
    else:
        watch = _by_engine(setup, work, course, held_out)
    return Outcome(tuple(watch.curve), round(watch.train_s, 2))


def _by_engine(setup: Setup, work: WorkingBundle, course: Course, held_out: Dataset) -> Watch:
    """What ``emberlora edge train`` does, all alive."""
    parameters = work.all_alive(work.adapter(Path(setup.start)))
    engine = work.engine
    engine.use(parameters)
    watch = Watch(lambda: _value(evaluate(engine, held_out), setup.recipe), checkpoints(setup.steps))
    watch.after(0)
    train(engine, parameters, course, on_step=lambda step, _steps, _loss: watch.after(step))
    return watch


def _by_peft(setup: Setup, course: Course, held_out: Dataset) -> Watch:
    """transformers + peft + torch's AdamW on the same batches."""
    import torch

    torch.set_num_threads(setup.threads)
    model = _peft_model(setup)
    optimizer, rates = _torch_adamw(model, course.training)
    watch = Watch(lambda: _value(_torch_score(model, held_out, setup.recipe), setup.recipe), checkpoints(course.steps))
    watch.after(0)
    batches = training_batches(course.dataset, course.training.batch_size, steps=course.steps, rng=course.rng)
    for number, batch in enumerate(batches):
        share = rate_share(course.schedule, number / max(course.steps - 1, 1))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        loss = torch.nn.functional.cross_entropy(_logits(model, batch, setup.recipe), torch.tensor(batch.labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.after(number + 1)
    return watch


def _peft_model(setup: Setup) -> Any:
    """The base model with the adapter to start from; eval mode, which for this model means no dropout."""
    from peft import PeftModel

    from export.quiet import quiet
    from export.sources import find_source, load

    labels = open_bundle(Path(setup.bundle), verify=False).manifest.labels
    with quiet():
        base = load(find_source(setup.model), setup.recipe.task, len(labels)).model
        return PeftModel.from_pretrained(base, setup.start, is_trainable=True, local_files_only=True).eval()


def _torch_adamw(model: Any, training: Training) -> tuple[Any, list[float]]:
    """The optimizer, one group a kind of tensor, and the groups' full learning rates."""
    import torch

    kinds: dict[float, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = training.lr_b if ".lora_B." in name else training.lr_head
            kinds.setdefault(training.lr_a if ".lora_A." in name else rate, []).append(parameter)
    groups = [{"params": parameters, "lr": rate} for rate, parameters in kinds.items()]
    betas = (training.beta1, training.beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=training.eps, weight_decay=training.weight_decay), list(kinds)


def _logits(model: Any, batch: Batch, recipe: Recipe) -> Any:
    """Logits of the batch's rows, shape (n, classes or words)."""
    import torch

    ids, mask = torch.tensor(batch.input_ids), torch.tensor(batch.attention_mask)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return logits if recipe.task == "classify" else logits.flatten(0, 1)[torch.tensor(batch.rows)]


def _torch_score(model: Any, held_out: Dataset, recipe: Recipe) -> Score:
    import torch

    def score(batch: Batch) -> Score:
        logits, labels = _logits(model, batch, recipe), torch.tensor(batch.labels)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return Score(float(loss), int((logits.argmax(dim=1) == labels).sum()), len(labels))

    with torch.no_grad():
        size = max(1, _MEASURED_TOKENS // recipe.max_tokens)
        return add_scores(score(batch) for batch in evaluation_batches(held_out, size))


def _value(score: Score, recipe: Recipe) -> float:
    """The recipe's metric."""
    return score.correct / score.rows if recipe.metric == "accuracy" else score.loss


def main(path: str) -> None:
    """Run what the file says and print the outcome."""
    outcome = run(msgspec.json.decode(Path(path).read_bytes(), type=Setup))
    sys.stdout.write(msgspec.json.encode(outcome).decode() + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
