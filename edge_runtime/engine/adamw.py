"""AdamW with decoupled weight decay (arXiv 1711.05101), in place, with optional clipping and proximal term."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from edge_runtime.bundle import Array
from edge_runtime.engine.parameters import AdapterParameters, Flat
from edge_runtime.wire import Training

# Elements worked on at a time: temporaries stay in the cache and memory does not grow with the adapter.
_CHUNK = 1 << 16


class AdamW:
    """State for the alive parameters only; a dead factor has none.

    Gradients are read where they are, tensor by tensor: no copy of all of them is made.

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
        self._parts = list(_parts(parameters, training))

    def step(self, gradients: Mapping[str, Array], *, share: float = 1.0) -> float:
        """Move the parameters by one step.

        Args:
            gradients: Mean gradient of every alive tensor by name.
            share: Of the learning rates, from 0 to 1.

        Returns:
            The global L2 norm of the gradient before clipping, the proximal term not included.
        """
        settings = self._training
        flat = {name: np.ascontiguousarray(gradients[name]).reshape(-1) for name in gradients}
        norm = math.sqrt(sum(float(np.dot(gradient, gradient)) for gradient in flat.values()))
        shrink = 1.0
        if settings.clip_norm is not None and norm > settings.clip_norm:
            shrink = settings.clip_norm / norm
        self.steps += 1
        correction = math.sqrt(1 - settings.beta2**self.steps) / (1 - settings.beta1**self.steps)
        for name, where, inside, rate in self._parts:
            gradient = flat[name][inside]
            if shrink != 1.0:
                gradient = gradient * np.float32(shrink)
            if settings.mu:
                away = self._parameters.flat[where] - self._parameters.origin[name].reshape(-1)[inside]
                gradient = gradient + np.float32(settings.mu) * away
            self._move(where, gradient, rate * share, correction)
        return norm

    def _move(self, where: slice, gradient: Flat, rate: float, correction: float) -> None:
        settings = self._training
        value, first, second = self._parameters.flat[where], self.first[where], self.second[where]
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


def _parts(parameters: AdapterParameters, training: Training) -> Iterator[tuple[str, slice, slice, float]]:
    """Pieces of at most _CHUNK elements: tensor, where in the flat array, where in the tensor, learning rate."""
    start = 0
    for name, shape in parameters.layout.blocks:
        rate = training.lr_head
        if name.endswith(".lora_a"):
            rate = training.lr_a
        elif name.endswith(".lora_b"):
            rate = training.lr_b
        count = math.prod(shape)
        for low in range(0, count, _CHUNK):
            high = min(low + _CHUNK, count)
            yield name, slice(start + low, start + high), slice(low, high), rate
        start += count
