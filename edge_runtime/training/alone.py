"""Training without a server: what ``emberlora edge train`` does."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.bundle import open_bundle, write_peft_folder
from edge_runtime.data import Dataset
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.terminal import Terminal
from edge_runtime.training.describing import Measured, measured
from edge_runtime.training.local import Course, Trained, evaluate, train
from edge_runtime.training.memory import MemorySampler
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import Products, Schedule, Training


class AloneOptions(msgspec.Struct, frozen=True):
    """The options of ``emberlora edge train``, as its ``--help`` explains them."""

    bundle: Path
    data: tuple[Path, ...]
    evaluation: tuple[Path, ...]
    out: Path
    adapter: Path | None
    epochs: int | None
    steps: int | None
    batch_size: int
    max_tokens: int | None
    lr_a: float
    lr_b: float
    lr_head: float
    lr_schedule: Schedule
    weight_decay: float
    clip_norm: float | None
    local_kill: float | None
    seed: int
    threads: int | None
    memory_budget_mb: int | None
    packed_weights: bool
    products: Products
    micro_tokens: int | None
    skip_bad_lines: bool

    def training(self, bundle_max_tokens: int) -> Training:
        """The settings as the training loop takes them.

        Raises:
            EngineInputError: an option is out of its range, or two contradict each other.
        """
        if self.epochs and self.steps:
            raise EngineInputError("--epochs and --steps: give one of them")
        if self.local_kill is not None and not 0 < self.local_kill <= 1:
            raise EngineInputError(f"--local-kill: expected more than 0 and at most 1, got {self.local_kill}")
        for name in ("lr_a", "lr_b", "lr_head", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise EngineInputError(f"--{name.replace('_', '-')}: expected a number from 0, got {value}")
        return Training(
            batch_size=self.batch_size,
            max_tokens=self.max_tokens or bundle_max_tokens,
            lr_a=self.lr_a,
            lr_b=self.lr_b,
            lr_head=self.lr_head,
            steps=self.steps,
            epochs=None if self.steps else self.epochs or 3,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm or None,
            local_kill=msgspec.UNSET if self.local_kill is None else self.local_kill,
        )


class AloneResult(msgspec.Struct, frozen=True):
    """What ``--json`` prints. Losses in nats; after an interruption nothing is measured again."""

    adapter: str
    bundle_digest: str
    weight: int
    steps: int
    loss_start: float | None
    loss_end: float | None
    skipped: int  # steps of modules that were left out because the module stood still
    train_s: float
    interrupted: bool
    before: Measured | None
    eval: Measured | None
    peak_private_mb: float | None
    peak_total_mb: float


def train_alone(options: AloneOptions, terminal: Terminal) -> AloneResult:
    """Train every module on local files and write a peft folder.

    Raises:
        BundleError, DataError, EngineError: as their names say; no adapter was written.
    """
    work = WorkingBundle(
        open_bundle(options.bundle),
        threads=options.threads,
        memory_budget_mb=options.memory_budget_mb,
        products=options.products,
        packed=options.packed_weights,
    )
    micro_tokens = work.micro_tokens(options.micro_tokens)
    settings = options.training(work.bundle.manifest.text.max_tokens)
    with MemorySampler() as memory:
        data = _load(work, options.data, settings, options.skip_bad_lines, terminal)
        held_out = None
        if options.evaluation:
            held_out = _load(work, options.evaluation, settings, options.skip_bad_lines, terminal)
        parameters = work.all_alive(work.adapter(options.adapter))
        before = _measure(work, parameters, held_out, micro_tokens)
        # Everything is alive, so there are no frozen blocks to remember.
        course = Course(
            data, settings, np.random.default_rng(options.seed), options.lr_schedule, micro_tokens=micro_tokens
        )
        trained = _run(work, parameters, course, terminal)
        write_peft_folder(options.out, work.bundle.manifest, parameters.tensors)
        after = _measure(work, parameters, held_out, micro_tokens) if trained else None
    return AloneResult(
        adapter=str(options.out),
        bundle_digest=work.bundle.digest,
        weight=data.weight,
        steps=trained.steps if trained else 0,
        loss_start=trained.loss_start if trained else None,
        loss_end=trained.loss_end if trained else None,
        skipped=trained.skipped if trained else 0,
        train_s=round(trained.seconds, 3) if trained else 0.0,
        interrupted=trained is None,
        before=before,
        eval=after,
        peak_private_mb=memory.peak.private_mb,
        peak_total_mb=memory.peak.total_mb,
    )


def _run(
    work: WorkingBundle,
    parameters: AdapterParameters,
    course: Course,
    terminal: Terminal,
) -> Trained | None:
    """Train with a progress bar; None when the user interrupted."""
    try:
        return train(
            work.engine,
            parameters,
            course,
            on_step=lambda step, steps, loss: terminal.progress(step, steps, f"loss {loss:.3f}"),
        )
    except KeyboardInterrupt:
        return None
    finally:
        terminal.close()


def _load(
    work: WorkingBundle, files: tuple[Path, ...], settings: Training, skip_bad: bool, terminal: Terminal
) -> Dataset:
    dataset = work.dataset(files, max_tokens=settings.max_tokens, skip_bad=skip_bad)
    for sentence in dataset.report.sentences():
        terminal.say(f"{', '.join(path.name for path in files)}: {sentence}")
    return dataset


def _measure(
    work: WorkingBundle, parameters: AdapterParameters, held_out: Dataset | None, micro_tokens: int
) -> Measured | None:
    if held_out is None:
        return None
    work.engine.use(parameters)
    return measured(evaluate(work.engine, held_out, micro_tokens=micro_tokens), work.bundle.manifest.task)
