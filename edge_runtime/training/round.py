"""One round on one device: from a verified plan and local files to an update frame."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_runtime.at_rest import Purpose, Vault
from edge_runtime.bundle import (
    Array,
    Bundle,
    TensorFileError,
    adapter_shapes,
    check_tensors,
    encode_tensors,
    map_tensors,
    open_bundle,
)
from edge_runtime.bundle.atomic import write_atomically
from edge_runtime.data import Dataset
from edge_runtime.engine.errors import DivergedError
from edge_runtime.engine.interface import Score
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.engine.remembered import RememberedHidden, memory_limit
from edge_runtime.training.carried import fitting, read_carried, some
from edge_runtime.training.checkpoint import Checkpoints, Position, ground_of
from edge_runtime.training.class_means import measure
from edge_runtime.training.clipping import clip_update
from edge_runtime.training.importance import Sample, draw_sample
from edge_runtime.training.job import (
    FRAME_NAME,
    IMPORTANCE_NAME,
    PERSONAL_NAME,
    RESIDUAL_NAME,
    Done,
    Evaluated,
    Event,
    MeasuredPart,
    Notice,
    Resumed,
    Stepped,
    Stilled,
    TrainingJob,
)
from edge_runtime.training.local import Course, Trained, evaluate, train
from edge_runtime.training.memory import MemorySampler
from edge_runtime.training.personal import PersonalTensors, read_personal, trained_personal
from edge_runtime.training.quantise import Flat, quantise
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import Layout, LocalMetrics, Plan, SignedPlan, Update, check_values, encode_update, open_plan

OpenWork = Callable[[Bundle, Plan, TrainingJob], WorkingBundle]


def working_bundle(bundle: Bundle, plan: Plan, job: TrainingJob) -> WorkingBundle:
    """A bundle opened as a plan and a job want it."""
    return WorkingBundle(
        bundle,
        threads=job.threads,
        memory_budget_mb=job.memory_budget_mb,
        products=plan.training.products_wanted,
        packed=job.packed_weights and bundle.manifest.base == "fp32",  # the operator chose the base, not the user
    )


def run_round(
    job: TrainingJob,
    emit: Callable[[Event], None],
    open_work: OpenWork = working_bundle,
    checkpoints: Checkpoints | None = None,
) -> tuple[bytes, Done]:
    """Evaluate the plan's adapter, train the alive parameters or measure class means, and make the frame.

    Where the plan quantises, what the frame leaves out is written into the job's folder, and so is what the device
    keeps for itself, both encrypted. Its own parameters stand in the adapter that is evaluated and trained.

    Args:
        job: Files, all verified by the parent; the plan's signature is checked again because it costs nothing.
        emit: Receives every event but the last.
        open_work: Opens the bundle; a process that trains many devices may give all of them the same one.
        checkpoints: Where a training goes on that was interrupted, and keeps how far it is; None: it begins anew.

    Returns:
        The unsealed frame, empty if the device has fewer examples than the plan wants, and the last event.

    Raises:
        PlanError, BundleError, DataError, EngineError: as their names say; nothing was written.
        UpdateValueError: training left the plan's bounds.
        WrongStorageKeyError: what was carried over is not of this home.
        StoppedError: the checkpoints ended it.
    """
    began = time.perf_counter()
    signed = open_plan(Path(job.plan).read_bytes(), Ed25519PublicKey.from_public_bytes(bytes.fromhex(job.plan_key)))
    plan = signed.plan
    bundle = open_bundle(Path(job.bundle), expected_digest=plan.bundle, verify=False)
    with MemorySampler() as memory:
        work = open_work(bundle, plan, job)
        adapter = map_tensors(Path(job.adapter))
        check_tensors(adapter, adapter_shapes(bundle.manifest, plan.ranks), what="adapter")
        personal = _personal(work, plan, job, emit)
        adapter |= personal.tensors
        dataset = _load(work, job.data, plan, job, emit)
        if dataset.weight < plan.min_examples:  # known before anything is computed
            return b"", Done(dataset.weight, LocalMetrics())
        errand = _Errand(signed, job, emit, personal, checkpoints)
        sample = _sample(dataset, errand)
        position = _position(work, sample.dataset, errand)
        score = _evaluate(work, adapter, errand, resumed=position is not None)
        if plan.state == "measure":
            made = _measure(work, adapter, dataset, errand)
        else:
            made = _train(work, adapter, sample, errand, position)
    seconds = time.perf_counter() - began + (position.seconds if position else 0.0)
    metrics = replace(_metrics(made.trained, score, memory, seconds), tier=job.tier)
    # First as if it were not to be clipped: what diverged is not to be hidden by scaling it down.
    check_values(made.values, dataset.weight, msgspec.structs.replace(plan.update, max_norm=msgspec.UNSET))
    values = _clipped(made.values, plan, emit)
    if plan.quantisation:
        values = _round_off(values, work, plan, job, emit)
    update = Update(values, dataset.weight, metrics)
    frame = encode_update(update, signed_plan=signed, layout=made.layout)
    return frame, _done(update, sample, made.trained)


def write_frame(job: TrainingJob, frame: bytes) -> None:
    """Keep a job's frame in its folder, encrypted."""
    _write(Vault(job.grant), Path(job.out) / FRAME_NAME, frame, "frame", job.round)


def _write(vault: Vault, path: Path, data: bytes, purpose: Purpose, round_: int) -> None:
    write_atomically(path, [vault.encrypt(data, purpose, round_=round_)])


@dataclass(frozen=True)
class _Errand:
    """What is asked, how, and who is told."""

    signed: SignedPlan
    job: TrainingJob
    emit: Callable[[Event], None]
    personal: PersonalTensors
    checkpoints: Checkpoints | None

    @property
    def plan(self) -> Plan:
        """What is asked."""
        return self.signed.plan


@dataclass(frozen=True)
class _Made:
    """An update's values, shape (layout.count,), and how they came about; None where nothing was trained."""

    layout: Layout
    values: Flat
    trained: Trained | None = None


def _done(update: Update, sample: Sample, trained: Trained | None) -> Done:
    if trained is None:
        return Done(update.weight, update.metrics)
    examples, tokens = (len(sample.dataset), len(sample.every)), sample.dataset.tokens
    return Done(update.weight, update.metrics, dict(trained.spared), trained.skipped, examples, tokens)


def _sample(dataset: Dataset, errand: _Errand) -> Sample:
    """The examples to train on; a measurement is of all of them."""
    plan, job = errand.plan, errand.job
    share = plan.training.example_share
    if plan.state == "measure" or share is msgspec.UNSET:
        return Sample(dataset)
    file = Path(job.importance) if job.importance else None
    rng = np.random.default_rng([plan.seed, plan.round, 1])  # the order of the examples has one without the last number
    sample = draw_sample(dataset, share, file, Vault(job.grant), rng)
    if sample.notice:
        errand.emit(Notice(sample.notice))
    return sample


def _position(work: WorkingBundle, dataset: Dataset, errand: _Errand) -> Position | None:
    """Where this training was interrupted; None where it begins."""
    signed, job = errand.signed, errand.job
    if errand.checkpoints is None or signed.plan.state == "measure":
        return None
    ground = ground_of(signed.digest, job.tier, dataset)
    position, trouble = errand.checkpoints.begin(
        ground, count=work.trained_layout(signed.plan, job.tier).count, examples=len(dataset)
    )
    if trouble:
        errand.emit(Notice(trouble))
    return position


def _train(
    work: WorkingBundle, adapter: dict[str, Array], sample: Sample, errand: _Errand, position: Position | None
) -> _Made:
    plan, emit, job = errand.plan, errand.emit, errand.job
    parameters = AdapterParameters(adapter, work.trained_layout(plan, job.tier))
    course = replace(_course(work, sample.dataset, plan, job), checkpoints=errand.checkpoints, resumed=position)
    if position is not None:
        emit(Resumed(position.step, course.steps))
    trained = train(
        work.engine,
        parameters,
        course,
        on_step=lambda step, steps, loss: emit(Stepped(step, steps, loss)),
        on_still=lambda step, modules: emit(Stilled(step, tuple(sorted(modules)))),
    )
    if course.remembered is not None and course.remembered.trouble:
        emit(Notice(course.remembered.trouble))
    _keep_personal(parameters, errand)
    if sample.chosen is not None:
        data = sample.encoded(trained.importance)
        _write(Vault(job.grant), Path(job.out) / IMPORTANCE_NAME, data, "importance", job.round)
    layout = work.plan_layout(plan, job.tier)
    return _Made(layout, parameters.change_of(layout), trained)


def _personal(work: WorkingBundle, plan: Plan, job: TrainingJob, emit: Callable[[Event], None]) -> PersonalTensors:
    file = Path(job.personal) if job.personal else None
    found = read_personal(Vault(job.grant), file, plan.personal_parts, work.bundle.manifest, plan.ranks)
    for text in found.notices:
        emit(Notice(text))
    return found


def _keep_personal(parameters: AdapterParameters, errand: _Errand) -> None:
    """Write what the device keeps for itself; the shared part is checked where the frame is made."""
    if not errand.personal.names:
        return
    trained = [name for name, _ in parameters.layout.blocks]
    kept = trained_personal(errand.personal, parameters.tensors, trained)
    broken = sorted(name for name, array in kept.items() if not np.isfinite(array).all())
    if broken:
        raise DivergedError(f"training: {broken[0]} is no longer finite: lower the learning rates")
    job = errand.job
    _write(Vault(job.grant), Path(job.out) / PERSONAL_NAME, encode_tensors(kept), "personal", job.round)


def _measure(work: WorkingBundle, adapter: dict[str, Array], dataset: Dataset, errand: _Errand) -> _Made:
    work.engine.use(work.none_alive(adapter))
    measured = measure(
        work.engine,
        dataset,
        work.bundle.manifest.head,
        micro_tokens=work.micro_tokens(errand.job.micro_tokens),
        on_part=lambda examples, of: errand.emit(MeasuredPart(examples, of)),
    )
    return _Made(measured.layout, measured.values)


def _clipped(change: Flat, plan: Plan, emit: Callable[[Event], None]) -> Flat:
    most = plan.update.max_norm
    if most is msgspec.UNSET:
        return change
    clipped = clip_update(change, max_norm=most)
    if clipped.norm > most:
        emit(Notice(f"the change was scaled down from norm {clipped.norm:.3g} to the plan's bound, {most:.3g}"))
    return clipped.values


def _round_off(change: Flat, work: WorkingBundle, plan: Plan, job: TrainingJob, emit: Callable[[Event], None]) -> Flat:
    """What of a change, and of what is left of earlier ones, is sent; writes what is left then."""
    shapes, vault = adapter_shapes(work.bundle.manifest, plan.ranks), Vault(job.grant)
    try:
        stored = read_carried(vault, "residual", Path(job.residual)) if job.residual else {}
    except TensorFileError as error:  # a device that never trained again would lose more than these roundings
        emit(Notice(f"what earlier updates left out is lost: {error}"))
        stored = {}
    residual, others = fitting(stored, shapes)
    if others:
        emit(Notice(f"what earlier updates left out is dropped where ranks changed: {some(others)}"))
    layout = work.plan_layout(plan, job.tier)
    for name in layout.components:  # of these, only some components are sent
        residual.setdefault(name, np.zeros(shapes[name], np.float32))
    rng = np.random.default_rng([job.rounding_seed, plan.round])
    found = quantise(change, layout, residual, rng=rng, max_norm=plan.update.max_norm or math.inf)
    _write(vault, Path(job.out) / RESIDUAL_NAME, encode_tensors(found.residual), "residual", job.round)
    return found.values


def _course(work: WorkingBundle, dataset: Dataset, plan: Plan, job: TrainingJob) -> Course:
    folder = Path(job.out)
    path = Path(job.remembered) if job.remembered else None
    secret = Vault(job.grant).key_of("remembered") if path else None
    remembered = RememberedHidden(folder, max_bytes=memory_limit(folder, job.remember_mb), path=path, secret=secret)
    return Course(
        dataset,
        plan.training,
        np.random.default_rng([plan.seed, plan.round]),
        micro_tokens=work.micro_tokens(job.micro_tokens),
        remembered=remembered,
    )


def _load(
    work: WorkingBundle, files: tuple[str, ...], plan: Plan, job: TrainingJob, emit: Callable[[Event], None]
) -> Dataset:
    paths = [Path(name) for name in files]
    dataset = work.dataset(paths, max_tokens=plan.training.max_tokens, skip_bad=job.skip_bad)
    for sentence in dataset.report.sentences():
        emit(Notice(sentence))
    return dataset


def _evaluate(work: WorkingBundle, adapter: dict[str, Array], errand: _Errand, *, resumed: bool) -> Score:
    """The plan's adapter on the device's evaluation data; what was found before an interruption holds after it."""
    job, emit, checkpoints = errand.job, errand.emit, errand.checkpoints
    if not job.evaluation:
        return Score()
    if checkpoints is not None and resumed and checkpoints.evaluation.rows:
        score = checkpoints.evaluation
    else:
        dataset = _load(work, job.evaluation, errand.plan, job, emit)
        work.engine.use(work.none_alive(adapter))
        score = evaluate(work.engine, dataset, micro_tokens=work.micro_tokens(job.micro_tokens))
    if checkpoints is not None:
        checkpoints.evaluation = score
    emit(Evaluated(score.rows, score.correct, score.loss))
    return score


def _metrics(trained: Trained | None, score: Score, memory: MemorySampler, seconds: float) -> LocalMetrics:
    return LocalMetrics(
        steps=trained.steps if trained else 0,
        eval_examples=score.rows,
        eval_correct=score.correct,
        loss_start=trained.loss_start if trained else None,
        loss_end=trained.loss_end if trained else None,
        eval_loss=score.loss if score.rows else None,
        seconds=seconds,
        peak_private_mb=memory.peak.private_mb,
        peak_total_mb=memory.peak.total_mb,
    )
