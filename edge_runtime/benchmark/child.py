"""One job measured in this process: ``python -m edge_runtime.benchmark.child``, job on stdin, answer on stdout.

A process of its own makes its peak memory its own. The step is that of training: the same division of the batch, the
same optimizer. Token ids are random; time and memory do not depend on them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.benchmark.cases import Job, next_plan_of, plan_of
from edge_runtime.benchmark.report import Figures, Length, Operator, Operators
from edge_runtime.bundle import BundleError, cut_ranks, encode_tensors, open_bundle
from edge_runtime.data import Batch
from edge_runtime.engine.adamw import AdamW
from edge_runtime.engine.errors import EngineError
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.engine.profile import profiled
from edge_runtime.training.accumulate import accumulate
from edge_runtime.training.held import end_with_parent, read_job
from edge_runtime.training.memory import MemorySampler
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import ModulePlan, Training
from edge_runtime.wire.envelope import OVERHEAD_BYTES

_WARM_STEPS = 2
_LR = 1e-5  # small: nothing may depend on where the weights wander
_SHORT_TOKENS = 8  # of the batch that shows what a change of plan costs: little but the change is in it


class _Trainee:
    """A bundle opened for a job."""

    def __init__(self, job: Job) -> None:
        budget = 0 if job.setting.memory == "recompute" else job.memory_budget_mb
        self.work = WorkingBundle(
            open_bundle(Path(job.bundle), verify=False),
            threads=job.threads,
            memory_budget_mb=budget,
            products=job.setting.products,
        )
        self._micro_tokens = self.work.micro_tokens(None)

    def take(self, plan: list[ModulePlan]) -> AdapterParameters:
        """The bundle's adapter cut to a plan, and in use."""
        bundle = self.work.bundle
        adapter = cut_ranks(bundle.manifest, bundle.initial_adapter(), {module.name: module.rank for module in plan})
        parameters = AdapterParameters(adapter, self.work.layout(plan, head_alive=True))
        self.work.engine.use(parameters)
        return parameters

    def stepper(self, parameters: AdapterParameters, batch: Batch) -> Callable[[], None]:
        """One training step on this batch at each call."""
        training = Training(len(batch.examples), batch.input_ids.shape[1], _LR, _LR, _LR, steps=1)
        optimizer = AdamW(parameters, training)

        def step() -> None:
            optimizer.step(accumulate(self.work.engine, batch, self._micro_tokens).tensors)

        return step

    def batch(self, examples: int, tokens: int) -> Batch:
        """Random tokens; every one but the last is followed by one to learn, or each example has a random label."""
        manifest, rng = self.work.bundle.manifest, np.random.default_rng(0)
        ids = rng.integers(0, manifest.text.vocab_size, size=(examples, tokens))
        if manifest.task == "classify":
            rows, labels = np.arange(examples) * tokens, rng.integers(0, len(manifest.labels), size=examples)
        else:
            rows, labels = np.arange(ids.size).reshape(ids.shape)[:, :-1].reshape(-1), ids[:, 1:].reshape(-1)
        return Batch(ids, np.ones_like(ids), rows=rows, labels=labels, examples=np.arange(examples))


def measure_figures(job: Job) -> Figures:
    """Time, memory, change of plan and bytes of a setting."""
    with MemorySampler() as memory:
        trainee = _Trainee(job)
        manifest = trainee.work.bundle.manifest
        parameters = trainee.take(plan_of(manifest, job.setting))
        step = trainee.stepper(parameters, trainee.batch(job.batch_size, job.tokens))
        for _ in range(_WARM_STEPS):
            step()
        times = _timed(step, job)
    typical = float(np.median(times))
    return Figures(
        steps=len(times),
        step_ms_p50=typical,
        step_ms_p95=float(np.percentile(times, 95)),
        tokens_per_s=1e3 * job.batch_size * job.tokens / typical,
        peak_private_mb=memory.peak.private_mb,
        peak_total_mb=memory.peak.total_mb,
        plan_change_ms=_plan_change_ms(trainee, job),
        update_bytes=parameters.layout.frame_bytes + OVERHEAD_BYTES,
        adapter_bytes=len(encode_tensors(parameters.tensors)),
    )


def measure_peak(job: Job) -> Length:
    """Peak memory of two steps: the second has the optimizer's state and whatever the first one left."""
    with MemorySampler() as memory:
        trainee = _Trainee(job)
        parameters = trainee.take(plan_of(trainee.work.bundle.manifest, job.setting))
        step = trainee.stepper(parameters, trainee.batch(job.batch_size, job.tokens))
        for _ in range(2):
            step()
    return Length(job.tokens, memory.peak.total_mb)


def measure_operators(job: Job) -> Operators:
    """Time by operator type of a step; recording slows operators down a little, the small ones most."""
    with tempfile.TemporaryDirectory(prefix="emberlora-bench-") as folder, profiled(Path(folder)) as profile:
        trainee = _Trainee(job)
        parameters = trainee.take(plan_of(trainee.work.bundle.manifest, job.setting))
        step = trainee.stepper(parameters, trainee.batch(job.batch_size, job.tokens))
        for _ in range(_WARM_STEPS + job.min_steps):
            step()
        found = profile.finish(skip=_WARM_STEPS / (_WARM_STEPS + job.min_steps))
    total = sum(found.values())
    return Operators(
        job.setting, tuple(Operator(name, ms / job.min_steps, ms / total) for name, ms in found.items() if ms)
    )


def _timed(step: Callable[[], None], job: Job) -> list[float]:
    """Milliseconds of each step."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < job.min_steps or (len(times) < job.max_steps and time.perf_counter() - began < job.seconds):
        times.append(_ms(step))
    return times


def _plan_change_ms(trainee: _Trainee, job: Job) -> float:
    """What taking another plan and its first step cost beyond a later step."""
    plan = next_plan_of(trainee.work.bundle.manifest, job.setting)
    batch = trainee.batch(1, min(_SHORT_TOKENS, job.tokens))
    began = time.perf_counter()
    parameters = trainee.take(plan)
    step = trainee.stepper(parameters, batch)
    step()
    first = 1e3 * (time.perf_counter() - began)
    return max(0.0, first - float(np.median([_ms(step) for _ in range(3)])))


def _ms(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - began)


def main() -> int:
    """Answer one job.

    Returns:
        Exit code: 0, or 1 with the reason on standard error.
    """
    job = msgspec.json.decode(read_job(), type=Job)
    end_with_parent()
    measure = {"figures": measure_figures, "peak": measure_peak, "operators": measure_operators}[job.measure]
    try:
        answer = measure(job)
    except (BundleError, EngineError, OSError, MemoryError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
