"""What a round's devices reported, put together. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cloud.outliers import Verdict
from cloud.store import UpdateRecord
from edge_runtime.bundle import Task
from edge_runtime.wire import LocalMetrics, RoundStatus

METRIC_NAMES: dict[Task, str] = {"classify": "accuracy", "lm": "loss"}


def summarise(
    updates: Sequence[UpdateRecord],
    *,
    task: Task,
    round_: int,
    seconds: float,
    state: str = "train",
    verdict: Verdict | None = None,
) -> RoundStatus:
    """One round, whose plan has this state, in figures. Its adapter is not known before the next plan is made.

    What is set aside is in the bytes alone: a device that is not believed is not asked how well the adapter does.

    Losses are means over devices by weight. The metric is made over all evaluated examples together: accuracy, or the
    mean loss by evaluated example; None when no device evaluated.
    """
    bytes_up = sum(update.bytes for update in updates)
    if verdict is not None:
        updates = [update for update in updates if update.receipt.device not in verdict.aside]
    correct = sum(update.metrics.eval_correct for update in updates)
    examples = sum(update.metrics.eval_examples for update in updates)
    accuracy = correct / examples if examples else None
    loss = _mean(updates, lambda m: m.eval_loss, lambda update: update.metrics.eval_examples)
    return RoundStatus(
        round=round_,
        devices=len(updates),
        weight=sum(update.receipt.weight for update in updates),
        loss_start=_mean(updates, lambda m: m.loss_start, lambda update: update.receipt.weight),
        loss_end=_mean(updates, lambda m: m.loss_end, lambda update: update.receipt.weight),
        metric=accuracy if task == "classify" else loss,
        eval_examples=examples,
        bytes_up=bytes_up,
        seconds=seconds,
        adapter="",
        state=state,
        outliers=verdict.outliers if verdict else (),
        judged=verdict.judged if verdict else None,
    )


def _mean(
    updates: Sequence[UpdateRecord],
    value: Callable[[LocalMetrics], float | None],
    weight: Callable[[UpdateRecord], int],
) -> float | None:
    pairs = [(value(update.metrics), weight(update)) for update in updates]
    known = [(number, share) for number, share in pairs if number is not None]
    total = sum(share for _, share in known)
    return sum(number * share for number, share in known) / total if total else None
