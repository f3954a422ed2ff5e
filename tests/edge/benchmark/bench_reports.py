"""Made-up results, so that pages and verdicts are tested without measuring."""

from __future__ import annotations

from edge_runtime.benchmark.cases import TIERS, Memory, Setting, Tier
from edge_runtime.benchmark.report import Case, Figures, Length, Measured, Operator, Operators, Report, Verdict

ALIVE: dict[Tier, int] = {tier: round(12 * share) for tier, share in TIERS.items()}
OPERATORS = Operators(
    Setting("full", 12, 8, "keep", "exact"),
    (Operator("Gemm", 60.0, 0.6), Operator("Softmax", 30.0, 0.3), Operator("FusedMatMul", 10.0, 0.1)),
)


def case(tier: Tier, *, ms: float, mb: float, memory: Memory = "keep") -> Case:
    """A setting at rank 8 with exact products that takes ``ms`` a step and ``mb`` at its peak."""
    figures = Figures(20, ms, 1.1 * ms, 5e5 / ms, 0.8 * mb, mb, 30.0, 1_000_200, 2_000_000)
    return Case(Setting(tier, ALIVE[tier], 8, memory, "exact"), figures)


def measured(cases: tuple[Case, ...], verdict: Verdict, *, lengths: tuple[Length, ...] = ()) -> Measured:
    """A bundle of twelve blocks with these results."""
    return Measured(
        bundle="somewhere/bundle",
        model="org/model <b>",
        base="int8",
        engine="blocks",
        blocks=12,
        parameters=50_000_000,
        r_max=8,
        max_tokens=512,
        tokens=128,
        batch_size=4,
        cases=cases,
        lengths=lengths,
        verdict=verdict,
        operators=OPERATORS,
        matrix_share=OPERATORS.matrix_share,
    )


def report(*bundles: Measured, budget_mb: int = 500) -> Report:
    """A report of a made-up board."""
    host: dict[str, str | int | None] = {
        "device": "Board <4>",
        "machine": "aarch64",
        "cores": 4,
        "threads": None,
        "memory_mb": 3800,
        "system": "Linux",
        "python": "3.11.2",
        "onnxruntime": "1.31.1",
    }
    return Report(host, quick=False, memory_budget_mb=budget_mb, step_limit_s=6.0, bundles=bundles)
