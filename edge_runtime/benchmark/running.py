"""The benchmark as a whole: jobs in the order they are run, one child process at a time, and what comes of them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_runtime.benchmark.cases import Job, Setting, settings_of
from edge_runtime.benchmark.errors import BenchmarkError
from edge_runtime.benchmark.host import describe_host
from edge_runtime.benchmark.report import Case, Figures, Length, Measured, Operators, Report
from edge_runtime.benchmark.verdict import STEP_LIMIT_S, choose, judge, next_length
from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.device.child import run_child
from edge_runtime.engine.budget import default_budget_mb
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.terminal import Terminal
from edge_runtime.training.session import WorkingBundle

_CHILD = (sys.executable, "-m", "edge_runtime.benchmark.child")
_LONGEST_TRIED = 2048  # tokens; a longer step takes minutes on a small board
_STEPS = {"min_steps": 5, "max_steps": 50, "seconds": 5.0}
_QUICK_STEPS = {"min_steps": 3, "max_steps": 3, "seconds": 0.0}
_PROFILED_STEPS = 3
T = TypeVar("T")


class BenchOptions(msgspec.Struct, frozen=True):
    """The options of ``emberlora edge bench``, as its ``--help`` explains them."""

    bundles: tuple[Path, ...]
    tokens: int
    batch_size: int
    threads: int | None
    memory_budget_mb: int | None
    profile: bool
    quick: bool


def run_bench(options: BenchOptions, terminal: Terminal) -> Report:
    """Measure every bundle.

    Raises:
        BundleError: a folder is not a bundle, or its files are not what its manifest says.
        EngineMissingError: this environment cannot run a bundle.
        EngineInputError: a profile is wanted of a bundle for onnxruntime-training.
        BenchmarkError: not one setting of a bundle could be measured.
    """
    bundles = [_checked(path, options) for path in options.bundles]
    budget_mb = default_budget_mb() if options.memory_budget_mb is None else options.memory_budget_mb
    measured = tuple(_Bench(bundle, options, budget_mb, terminal).run() for bundle in bundles)
    return Report(describe_host(options.threads), options.quick, budget_mb, STEP_LIMIT_S, measured)


def _checked(path: Path, options: BenchOptions) -> Bundle:
    bundle = open_bundle(path)
    WorkingBundle(bundle)  # says in one line when this environment cannot run it
    if options.profile and bundle.manifest.engine != "blocks":
        raise EngineInputError(f"--profile: {path}: a bundle for onnxruntime-training cannot be profiled")
    return bundle


class _Bench:
    """One bundle's benchmark."""

    def __init__(self, bundle: Bundle, options: BenchOptions, budget_mb: int, terminal: Terminal) -> None:
        self._bundle = bundle
        self._manifest = bundle.manifest
        self._options = options
        self._budget_mb = budget_mb
        self._terminal = terminal
        self._tokens = min(options.tokens, bundle.manifest.text.max_tokens)

    def run(self) -> Measured:
        """Measure it.

        Raises:
            BenchmarkError: not one setting could be measured.
        """
        manifest, options = self._manifest, self._options
        if self._tokens < options.tokens:
            self._terminal.say(f"{self._bundle.folder.name}: {self._tokens} tokens an example: the model's limit")
        cases = tuple(self._cases())
        if not any(case.figures for case in cases):
            raise BenchmarkError(f"{self._bundle.folder}: nothing could be measured: {cases[0].failed}")
        chosen = choose(cases, rank=manifest.r_max, budget_mb=self._budget_mb)
        lengths = tuple(self._lengths(chosen.setting)) if chosen is not None else ()
        operators = self._operators(cases) if options.profile else None
        self._terminal.close()
        batch = (options.batch_size, self._tokens)
        return Measured(
            bundle=str(self._bundle.folder),
            model=manifest.model,
            base=manifest.base,
            engine=manifest.engine,
            blocks=len(manifest.blocks),
            parameters=manifest.parameters,
            r_max=manifest.r_max,
            max_tokens=manifest.text.max_tokens,
            tokens=self._tokens,
            batch_size=options.batch_size,
            cases=cases,
            lengths=lengths,
            verdict=judge(chosen, lengths, manifest, batch=batch, budget_mb=self._budget_mb),
            operators=operators,
            matrix_share=None if operators is None else operators.matrix_share,
        )

    def _cases(self) -> Iterator[Case]:
        """A setting that fails, for want of memory as a rule, is a result too."""
        settings = settings_of(self._manifest, quick=self._options.quick)
        for number, setting in enumerate(settings):
            self._terminal.progress(number, len(settings), f"{self._bundle.folder.name}: {setting.tier}")
            found = self._ask(self._job("figures", setting), Figures)
            yield Case(setting, None, found) if isinstance(found, str) else Case(setting, found)
        self._terminal.close()

    def _lengths(self, setting: Setting) -> Iterator[Length]:
        """One example in the thriftiest way of this tier, ever longer; quick: two lengths."""
        last = min(self._manifest.text.max_tokens, 256 if self._options.quick else _LONGEST_TRIED)
        thrifty = msgspec.structs.replace(setting, memory="recompute")
        tried: list[Length] = []
        while (tokens := next_length(tried, budget_mb=self._budget_mb, last=last)) is not None:
            self._terminal.progress(tokens, last, f"{self._bundle.folder.name}: tokens that fit")
            job = msgspec.structs.replace(self._job("peak", thrifty), tokens=tokens, batch_size=1)
            found = self._ask(job, Length)
            tried.append(Length(tokens, None) if isinstance(found, str) else found)
            yield tried[-1]

    def _operators(self, cases: tuple[Case, ...]) -> Operators | None:
        """Of the first setting that worked: most alive, activations kept."""
        setting = next(case.setting for case in cases if case.figures is not None)
        found = self._ask(self._job("operators", setting), Operators)
        if isinstance(found, str):
            self._terminal.say(f"{self._bundle.folder.name}: no profile: {found}")
            return None
        return found

    def _job(self, measure: str, setting: Setting) -> Job:
        options = self._options
        steps = _QUICK_STEPS if options.quick else _STEPS
        if measure == "operators":
            steps = {**steps, "min_steps": _PROFILED_STEPS}
        fields = {
            "measure": measure,
            "bundle": str(self._bundle.folder),
            "setting": setting,
            "batch_size": options.batch_size,
            "tokens": self._tokens,
            "threads": options.threads,
            "memory_budget_mb": options.memory_budget_mb,
        }
        return msgspec.convert({**fields, **steps}, Job)

    def _ask(self, job: Job, kind: type[T]) -> T | str:
        """A child's answer, or one line about how it ended without one."""
        ended = asyncio.run(run_child(_CHILD, msgspec.json.encode(job)))
        if ended.code != 0:
            return ended.describe()
        return msgspec.json.decode(ended.output, type=kind)
