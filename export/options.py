"""What an export is asked for and what it reports; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.bundle import Base, EngineName, Task

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class ExportOptions:
    """One export.

    ``rank``, ``alpha``, ``targets`` and ``labels`` may be None: then a peft folder given as ``model`` decides, and
    without one rank 16, alpha 2 · rank and every linear layer of the blocks.
    """

    model: str  # preset, Hugging Face folder, or peft adapter folder
    task: Task
    out: Path
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    max_tokens: int = 512  # a cap; the model's own limit wins where it is lower
    base: Base = "fp32"  # how frozen matrices are stored
    seed: int = 0
    force: bool = False
    engine: EngineName = "blocks"
    ort_training_python: Path | None = None  # interpreter with onnxruntime-training; None: this one


@dataclass(frozen=True)
class VerifiedCase:
    """One comparison with autograd: shape, rank assignment, and the worst relative error with its tensor."""

    name: str
    max_rel_err: float
    worst: str


@dataclass(frozen=True)
class ExportReport:
    """What was made; ``trainable`` counts LoRA factors at full rank plus head parameters."""

    bundle: str
    digest: str
    bytes: int
    modules: int
    parameters: int
    trainable: int
    export_s: float
    nodes: dict[str, int] = field(default_factory=dict)  # graph file -> number of nodes
    makers: dict[str, str] = field(default_factory=dict)  # block graph file -> "llama template", "tracer"
    cases: tuple[VerifiedCase, ...] = ()
    fast_rel_err: float | None = None  # of a block with int8 products; None: the bundle has none

    @property
    def max_rel_err(self) -> float:
        """The worst relative error of any tensor in any case."""
        return max((case.max_rel_err for case in self.cases), default=0.0)
