"""The two things this package does, importable without torch, which is loaded when one of them is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_runtime.bundle import Task
from export.errors import ExtraMissingError
from export.options import ExportOptions, ExportReport
from export.ort_training.child import run_child


@dataclass(frozen=True)
class Evaluation:
    """What a peft adapter reaches on held-out data.

    ``value`` is the accuracy (0 to 1) or the loss itself; ``loss`` the mean in nats, an example or a trained token;
    ``examples`` counts texts, or for a language model trained tokens.
    """

    metric: Literal["accuracy", "loss"]
    value: float
    loss: float
    examples: int


def _no_progress(line: str) -> None:
    """Drop a progress line."""


def export_bundle(options: ExportOptions, progress: Callable[[str], None] = _no_progress) -> ExportReport:
    """Make a bundle and verify it against autograd.

    Raises:
        ExportError: see :mod:`export.errors`; nothing is left at ``options.out`` then.
    """
    try:
        if options.engine == "ort-training":
            run_child(options.ort_training_python, "probe")
            from export.ort_training.pipeline import run
        else:
            from export.pipeline import run  # takes seconds and a GB: only when needed
    except ImportError as error:
        raise _extra_missing(error) from error
    return run(options, progress)


def evaluate_adapter(
    model: str, adapter: Path, data: Path, *, max_tokens: int = 512, task: Task | None = None
) -> Evaluation:
    """Evaluate a peft adapter with torch and peft on records of ``data``.

    Args:
        model: Preset or Hugging Face folder of the base model.
        adapter: The peft folder; ``labels.json`` in it makes the task ``classify``.
        data: ``.jsonl`` or ``.csv`` of {"text", "label"} or {"text"}.
        max_tokens: Cap on a text's tokens, as in the bundle.
        task: To override what the folder says.

    Raises:
        ExportError: the model, adapter or data cannot be used.
    """
    try:
        from export.evaluate import evaluate
    except ImportError as error:
        raise _extra_missing(error) from error
    return evaluate(model, adapter, data, max_tokens=max_tokens, task=task)


def _extra_missing(error: ImportError) -> ExtraMissingError:
    return ExtraMissingError(f"{error.name or error}: not installed: run pip install 'emberlora[export]'")
