"""AdamW with decoupled weight decay (arXiv 1711.05101), in place, with optional clipping and proximal term."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edge_runtime.bundle import Array
from edge_runtime.engine.parameters import AdapterParameters, Flat
from edge_runtime.wire import Training

# Elements worked on at a time: temporaries stay in the cache and memory does not grow with the adapter.
_CHUNK = 1 << 16


class AdamW:
    """State for the alive parameters only; a dead factor has none.

    Attributes:
        first: Running mean of the gradients, shape (layout.count,).
        second: Running mean of their squares, same shape.
        steps: Steps taken.
    """

    def __init__(self, parameters: AdapterParameters, training: Training) -> None:
        """Learning rates are by kind of tensor: A factors, B factors, head."""
        self._parameters = parameters
        self._training = training
        count = parameters.layout.count
        self.first: Flat = np.zeros(count, dtype=np.float32)
        self.second: Flat = np.zeros(count, dtype=np.float32)
        self.steps = 0
        self._gradient: Flat = np.empty(count, dtype=np.float32)
        self._groups = _rate_groups(parameters, training)

    def step(self, gradients: Mapping[str, Array], *, share: float = 1.0) -> float:
        """Move the parameters by one step.

        Args:
            gradients: Mean gradient of every alive tensor by name.
            share: Of the learning rates, from 0 to 1.

        Returns:
            The global L2 norm of the gradient before clipping, the proximal term not included.
        """
        settings = self._training
        gradient = self._gradient
        self._parameters.gather(gradients, gradient)
        norm = math.sqrt(float(np.dot(gradient, gradient)))
        if settings.clip_norm is not None and norm > settings.clip_norm:
            gradient *= np.float32(settings.clip_norm / norm)
        self.steps += 1
        correction = math.sqrt(1 - settings.beta2**self.steps) / (1 - settings.beta1**self.steps)
        for start, stop, rate in self._groups:
            for low in range(start, stop, _CHUNK):
                self._move(slice(low, min(low + _CHUNK, stop)), rate * share, correction)
        return norm

    def _move(self, part: slice, rate: float, correction: float) -> None:
        settings = self._training
        value, gradient = self._parameters.flat[part], self._gradient[part]
        first, second = self.first[part], self.second[part]
        if settings.mu:
            gradient = gradient + np.float32(settings.mu) * (value - self._parameters.start[part])
        first += np.float32(1 - settings.beta1) * (gradient - first)
        second += np.float32(1 - settings.beta2) * (gradient * gradient - second)
        if settings.weight_decay:
            value *= np.float32(1 - rate * settings.weight_decay)
        # eps is scaled like the second moment, so that the step equals the textbook m̂ / (√v̂ + eps).
        eps = settings.eps * math.sqrt(1 - settings.beta2**self.steps)
        denominator = np.sqrt(second)
        denominator += np.float32(eps)
        np.divide(first, denominator, out=denominator)
        denominator *= np.float32(rate * correction)
        value -= denominator


def _rate_groups(parameters: AdapterParameters, training: Training) -> list[tuple[int, int, float]]:
    """Runs of neighbouring elements with one learning rate: (start, stop, rate)."""
    groups: list[tuple[int, int, float]] = []
    start = 0
    for name, shape in parameters.layout.blocks:
        rate = training.lr_head
        if name.endswith(".lora_a"):
            rate = training.lr_a
        elif name.endswith(".lora_b"):
            rate = training.lr_b
        stop = start + math.prod(shape)
        if groups and groups[-1][2] == rate:
            groups[-1] = (groups[-1][0], stop, rate)
        else:
            groups.append((start, stop, rate))
        start = stop
    return groups
