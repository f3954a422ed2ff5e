"""AdamW with decoupled weight decay (arXiv 1711.05101), in place, with optional clipping and proximal term."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from edge_runtime.bundle import Array
from edge_runtime.engine.parameters import AdapterParameters, Flat
from edge_runtime.wire import Training

# Elements worked on at a time: temporaries stay in the cache, memory does not grow with the adapter, and an adapter of
# many small tensors takes few calls.
_CHUNK = 1 << 16


class AdamW:
    """State for the alive parameters only; a dead factor has none.

    Gradients are read where they are, a piece at a time: no copy of all of them is made.

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
        self._frozen: frozenset[str] = frozenset()
        self._pieces = list(_pieces(parameters, training))

    def freeze(self, names: Collection[str]) -> None:
        """Move these tensors no longer, so that steps take no gradient of them; the state of the others goes on."""
        self._frozen |= frozenset(names)
        self._pieces = list(_pieces(self._parameters, self._training, self._frozen))

    def resume(self, first: Flat, second: Flat, steps: int) -> None:
        """Go on after ``steps`` steps from the moments that they left, each of shape (layout.count,)."""
        self.first[:], self.second[:], self.steps = first, second, steps

    def step(self, gradients: Mapping[str, Array], *, share: float = 1.0) -> float:
        """Move the parameters by one step.

        Args:
            gradients: Mean gradient of every alive tensor that is not frozen by name, of all its components.
            share: Of the learning rates, from 0 to 1.

        Returns:
            The global L2 norm of the gradient of what is trained before clipping, the proximal term not included.
        """
        settings = self._training
        where = self._parameters.layout.where
        flat = {name: np.ascontiguousarray(gradient[where(name)]).reshape(-1) for name, gradient in gradients.items()}
        norm = math.sqrt(sum(float(np.dot(gradient, gradient)) for gradient in flat.values()))
        shrink = 1.0
        if settings.clip_norm is not None and norm > settings.clip_norm:
            shrink = settings.clip_norm / norm
        self.steps += 1
        correction = math.sqrt(1 - settings.beta2**self.steps) / (1 - settings.beta1**self.steps)
        for piece in self._pieces:
            self._move(piece, self._gathered(piece, flat, shrink), share, correction)
        self._parameters.settle()
        return norm

    def _gathered(self, piece: _Piece, gradients: Mapping[str, Flat], shrink: float) -> Flat:
        """The piece's gradient with what clipping and the proximal term make of it, shape (count,)."""
        settings = self._training
        gathered: Flat = np.empty(piece.where.stop - piece.where.start, dtype=np.float32)
        for span in piece.spans:
            gathered[span.at] = gradients[span.name][span.inside]
        if shrink != 1.0:
            gathered *= np.float32(shrink)
        if settings.mu:
            gathered += np.float32(settings.mu) * self._parameters.flat[piece.where]
            for span in piece.spans:
                origin = self._parameters.origin[span.name].reshape(-1)[span.inside]
                gathered[span.at] -= np.float32(settings.mu) * origin
        return gathered

    def _move(self, piece: _Piece, gradient: Flat, share: float, correction: float) -> None:
        settings = self._training
        value, first, second = self._parameters.flat[piece.where], self.first[piece.where], self.second[piece.where]
        first += np.float32(1 - settings.beta1) * (gradient - first)
        second += np.float32(1 - settings.beta2) * (gradient * gradient - second)
        # eps is scaled like the second moment, so that the step equals the textbook m̂ / (√v̂ + eps).
        eps = settings.eps * math.sqrt(1 - settings.beta2**self.steps)
        denominator = np.sqrt(second)
        denominator += np.float32(eps)
        np.divide(first, denominator, out=denominator)
        for span in piece.spans:
            rate = span.rate * share
            if settings.weight_decay:
                value[span.at] *= np.float32(1 - rate * settings.weight_decay)
            denominator[span.at] *= np.float32(rate * correction)
        value -= denominator


@dataclass(frozen=True)
class _Span:
    """A tensor's share of a piece: where in the tensor, where in the piece, and its learning rate."""

    name: str
    inside: slice
    at: slice
    rate: float


@dataclass(frozen=True)
class _Piece:
    """Elements that are worked on together, many small tensors or a part of a large one: where in the flat array."""

    where: slice
    spans: tuple[_Span, ...]


def _pieces(parameters: AdapterParameters, training: Training, frozen: Collection[str] = ()) -> Iterator[_Piece]:
    """The flat array in pieces of _CHUNK elements, without frozen tensors; the last before a gap is smaller."""
    start, spans = 0, list[_Span]()
    filled = 0
    for name, shape in parameters.layout.blocks:
        rate, count, done = learning_rate(name, training), math.prod(shape), 0
        if name in frozen:
            if spans:
                yield _Piece(slice(start, start + filled), tuple(spans))
            start, filled, spans = start + filled + count, 0, []
            continue
        while done < count:
            size = min(count - done, _CHUNK - filled)
            spans.append(_Span(name, slice(done, done + size), slice(filled, filled + size), rate))
            done, filled = done + size, filled + size
            if filled == _CHUNK:
                yield _Piece(slice(start, start + filled), tuple(spans))
                start, filled, spans = start + filled, 0, []
    if spans:
        yield _Piece(slice(start, start + filled), tuple(spans))


def learning_rate(name: str, training: Training) -> float:
    """Of a tensor, by its kind: A factors, B factors, head."""
    if name.endswith(".lora_a"):
        return training.lr_a
    if name.endswith(".lora_b"):
        return training.lr_b
    return training.lr_head
