"""What every training engine offers, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_runtime.bundle import Array
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.engine.remembered import RememberedHidden

Ids = npt.NDArray[np.int64]


class TokenBatch(Protocol):
    """b examples padded on the right to s tokens, and n rows of b·s that the head sees."""

    @property
    def input_ids(self) -> Ids:
        """Token ids, shape (b, s)."""

    @property
    def attention_mask(self) -> Ids:
        """1 for tokens, 0 for padding, shape (b, s)."""

    @property
    def rows(self) -> Ids:
        """Distinct flat positions in b·s, shape (n,)."""

    @property
    def labels(self) -> Ids:
        """Class or next token of each row, shape (n,)."""


@dataclass(frozen=True)
class Score:
    """Sums over the rows of a batch; adding two scores adds every field."""

    loss_sum: float = 0.0  # nats
    correct: int = 0
    rows: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.loss_sum + other.loss_sum, self.correct + other.correct, self.rows + other.rows)

    @property
    def loss(self) -> float:
        """Mean loss in nats a row."""
        return self.loss_sum / max(self.rows, 1)


@dataclass(frozen=True)
class Gradients:
    """What a training step is made of.

    Attributes:
        score: Of the batch.
        tensors: The gradient of its *mean* loss for every alive tensor by adapter name.
        importance: How much each example pulls, shape (b,): the L2 norm of the gradient of a row's own loss by the last
            hidden state, the mean over the example's rows. None where the engine does not make that gradient.
    """

    score: Score
    tensors: dict[str, Array]
    importance: Array | None = None


class Engine(Protocol):
    """A model with an adapter, on one device."""

    def use(self, parameters: AdapterParameters, remembered: RememberedHidden | None = None) -> None:
        """Take this adapter and alive set; ``parameters.flat`` may change between calls.

        Args:
            parameters: What is trained, and the rest of the adapter.
            remembered: For the training steps that follow; the engine may leave it unused.
        """

    def gradients(self, batch: TokenBatch) -> Gradients:
        """Loss and gradients of the alive tensors."""

    def evaluate(self, batch: TokenBatch) -> Score:
        """Loss and correct predictions, nothing kept."""

    def logits(self, batch: TokenBatch) -> Array:
        """Logits of the batch's rows, shape (n, classes)."""
