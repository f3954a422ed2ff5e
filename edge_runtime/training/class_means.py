"""A measuring round on a device: sums over its examples of what enters the classifier, one exact forward pass each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_runtime.bundle import Head
from edge_runtime.data import Dataset, evaluation_batches
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.interface import Engine
from edge_runtime.engine.model import BlockEngine
from edge_runtime.training.accumulate import MICRO_TOKENS, micro_batches
from edge_runtime.wire import Layout, measurement_layout, pack_triangle

OnPart = Callable[[int, int], None]  # examples done, examples in all
_BATCH_SIZE = 32


@dataclass(frozen=True)
class Measured:
    """The blocks of :func:`edge_runtime.wire.measurement_layout`, flat, shape (layout.count,), float32."""

    layout: Layout
    values: npt.NDArray[np.float32]


def measure(
    engine: Engine, dataset: Dataset, head: Head, *, micro_tokens: int = MICRO_TOKENS, on_part: OnPart | None = None
) -> Measured:
    """Sum what the model with the adapter in use makes of a labelled dataset.

    Sums are made in float64 and rounded once. Counts below 2**24 are exact.

    Args:
        engine: With the adapter in use.
        dataset: Every example of it has a label.
        head: The manifest's.
        micro_tokens: Tokens that go through the model at once, padding included.
        on_part: Called after every batch; may raise to stop.

    Raises:
        EngineInputError: the bundle has no classifier that can be measured.
    """
    if not isinstance(engine, BlockEngine) or head.linear is None:
        raise EngineInputError("measuring class means: needs a bundle of blocks with a linear classifier")
    classes, features = head.linear
    sums, moments = np.zeros((classes, features)), np.zeros((features, features))
    counts, done = np.zeros(classes), 0
    for batch in evaluation_batches(dataset, _BATCH_SIZE):
        for part in micro_batches(batch, micro_tokens):
            inputs = engine.features(part).astype(np.float64)
            np.add.at(sums, part.labels, inputs)
            counts += np.bincount(part.labels, minlength=classes)
            moments += inputs.T @ inputs
        done += len(batch.examples)
        if on_part is not None:
            on_part(done, len(dataset))
    values = np.concatenate([sums.reshape(-1), counts, pack_triangle(moments)])
    return Measured(measurement_layout(classes, features), values.astype(np.float32))
