"""What a benchmark found, in the fields of its JSON, and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from edge_runtime.benchmark.cases import Setting, Tier
from edge_runtime.bundle import Base, EngineName

# What counts as a matrix product, plain or fused with what stands around it.
MATRIX_PRODUCTS = frozenset(
    {
        *("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "FusedMatMulActivation", "TransposeMatMul"),
        *("DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul", "MatMulNBits"),
    }
)


class Figures(msgspec.Struct, frozen=True):
    """One setting's figures. Memory is of the whole training process, weights mapped from disk counted in the total."""

    steps: int  # that were timed, after two that were not
    step_ms_p50: float  # forward, backward and optimizer
    step_ms_p95: float
    tokens_per_s: float
    peak_private_mb: float | None  # MiB; None where the system does not tell
    peak_total_mb: float
    plan_change_ms: float  # taking another rank and alive set in every block, beyond the step itself
    update_bytes: int  # sent after a round, sealed
    adapter_bytes: int  # received before it


class Case(msgspec.Struct, frozen=True):
    """A setting and what was measured, or why nothing was."""

    setting: Setting
    figures: Figures | None
    failed: str | None = None


class Length(msgspec.Struct, frozen=True):
    """One example of so many tokens in a step that keeps nothing; None when the process did not survive it."""

    tokens: int
    peak_total_mb: float | None  # MiB


class Operator(msgspec.Struct, frozen=True):
    """An operator type: milliseconds of a step, and the share of all operators' time."""

    name: str
    ms: float
    share: float


class Operators(msgspec.Struct, frozen=True):
    """Where a step's time goes, the largest first; shares add up to 1."""

    setting: Setting
    operators: tuple[Operator, ...]

    @property
    def matrix_share(self) -> float:
        """Share of matrix products in all operators' time."""
        return sum(operator.share for operator in self.operators if operator.name in MATRIX_PRODUCTS)


class Verdict(msgspec.Struct, frozen=True):
    """What fits this device; ``tier`` None when nothing does. See :mod:`edge_runtime.benchmark.verdict`."""

    tier: Tier | None
    setting: Setting | None  # the fastest of that tier
    longest_tokens: int | None  # None: not a single length fits, or there is no tier
    tried: bool  # whether that length was run, or follows from others
    sentence: str


class Measured(msgspec.Struct, frozen=True):
    """Everything about one bundle."""

    bundle: str
    model: str
    base: Base
    engine: EngineName
    blocks: int
    parameters: int
    r_max: int
    max_tokens: int  # the model's limit
    tokens: int  # of each example here
    batch_size: int
    cases: tuple[Case, ...]
    lengths: tuple[Length, ...]
    verdict: Verdict
    operators: Operators | None = None
    matrix_share: float | None = None


class Report(msgspec.Struct, frozen=True):
    """The whole benchmark; ``quick`` marks figures of very few steps."""

    host: dict[str, str | int | None]
    quick: bool
    memory_budget_mb: int  # MiB, what the verdict compares with
    step_limit_s: float  # the slowest step the verdict accepts
    bundles: tuple[Measured, ...]


def lines(report: Report) -> Iterator[str]:
    """The report for a terminal."""
    for bundle in report.bundles:
        yield f"{bundle.model}, base {bundle.base}, {bundle.batch_size} x {bundle.tokens} tokens a step"
        yield ""
        yield from _table([_HEADINGS, *(_row(case, bundle.blocks) for case in bundle.cases)])
        yield ""
        if bundle.operators is not None:
            yield from _table(
                [("operator", "ms a step", "share")]
                + [(found.name, f"{found.ms:.2f}", f"{found.share:.1%}") for found in bundle.operators.operators[:12]]
            )
            yield matrix_line(bundle.operators)
            yield ""
        yield bundle.verdict.sentence
        yield ""


def matrix_line(operators: Operators) -> str:
    """The share of matrix products as a sentence."""
    return f"{operators.matrix_share:.0%} of the operators' time is matrix products."


def mebibytes(value: float | None) -> str:
    """A figure of memory; empty where the system does not tell."""
    return "" if value is None else f"{value:,.0f}"


def milliseconds(value: float) -> str:
    """A time with as many places as are worth reading."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def kilobytes(count: int) -> str:
    """Bytes in a round, in kB."""
    return f"{count / 1e3:,.1f}"


_HEADINGS = (
    *("alive", "rank", "activations", "products", "p50 ms", "p95 ms", "tokens/s", "private MiB", "total MiB"),
    *("new plan ms", "up kB", "down kB"),
)
_LEFT = ("alive", "activations", "products", "operator")


def _row(case: Case, blocks: int) -> tuple[str, ...]:
    setting, found = case.setting, case.figures
    settings = (
        f"{setting.blocks_alive} of {blocks}",
        str(setting.rank),
        "kept" if setting.memory == "keep" else "recomputed",
        setting.products,
    )
    if found is None:
        return (*settings, f"failed: {case.failed}")
    return (
        *settings,
        milliseconds(found.step_ms_p50),
        milliseconds(found.step_ms_p95),
        f"{found.tokens_per_s:,.0f}",
        mebibytes(found.peak_private_mb),
        mebibytes(found.peak_total_mb),
        f"{found.plan_change_ms:,.0f}",
        kilobytes(found.update_bytes),
        kilobytes(found.adapter_bytes),
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell; a row that is too short ends in a sentence of any width."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in full) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if heading in _LEFT or len(row) < len(widths) else cell.rjust(width)
            for cell, width, heading in zip(row, widths, rows[0], strict=False)
        ]
        yield "  ".join(cells).rstrip()
