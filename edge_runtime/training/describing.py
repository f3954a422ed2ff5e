"""Scores as people and machines read them."""

from __future__ import annotations

import math

import msgspec

from edge_runtime.bundle import Task
from edge_runtime.engine.interface import Score


class Measured(msgspec.Struct, frozen=True):
    """A score: ``metric`` "accuracy" is a fraction from 0 to 1, "loss" is mean nats a trained token."""

    metric: str
    value: float
    loss: float
    correct: int
    examples: int  # texts for a classifier, trained tokens for a language model

    def __str__(self) -> str:
        if self.metric == "accuracy":
            return f"accuracy {self.value:.4f} ({self.correct} of {self.examples}), loss {self.loss:.4f}"
        perplexity = math.exp(min(self.loss, 700.0))  # above it a float overflows
        return f"loss {self.loss:.4f} nats, perplexity {perplexity:.2f} over {self.examples} tokens"


def measured(score: Score, task: Task) -> Measured:
    """The score as the metric of its task."""
    accuracy = score.correct / max(score.rows, 1)
    metric, value = ("accuracy", accuracy) if task == "classify" else ("loss", score.loss)
    return Measured(metric, value, score.loss, score.correct, score.rows)
