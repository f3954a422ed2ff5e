"""The head of a language model: the output projection in chunks of the vocabulary, never all logits at once.

See :class:`edge_runtime.bundle.Vocabulary` for what a pass over the chunks carries along. Each chunk of weights is
used for the logits and for the gradient while it is in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnxruntime as ort

from edge_runtime.bundle import Array, Head
from edge_runtime.engine.block import OrtValues, Session
from edge_runtime.engine.graph import JointGraph
from edge_runtime.engine.interface import Score

# Rows of the vocabulary and of the batch at a time: 512 x 2048 logits take 4 MiB. On two cores with 128 and 512 rows,
# 1024 to 4096 were equally fast, and all of the vocabulary at once a third slower.
_CHUNK = 2048
_ROWS = 512
_LOSS = ("top", "total", "gold")
_GRADIENT = (*_LOSS, "pull", "target")
_LOWEST = np.finfo(np.float32).min


class VocabularyHead:
    """Offers what :class:`edge_runtime.engine.head.ClassHead` does; nothing of it is trained."""

    def __init__(
        self, head: Head, norm: JointGraph, chunk: JointGraph, norm_weights: OrtValues, weights: Mapping[str, Array]
    ) -> None:
        """Args: the manifest's head, its two graphs, the norm's weights bound, and the vocabulary's, (v, …) each."""
        self._norm = Session(norm, ("normed",))
        self._norm_backward = Session(norm, ("d_rows",))
        self._norm_weights = norm_weights
        self._graph = chunk
        self._sessions: dict[tuple[str, ...], Session] = {}
        self._classes = min(len(array) for array in weights.values())
        self._chunk, self._rows = _CHUNK, _ROWS
        self._chunks = [
            (first, {f"w:{name}": _bound(array[first : first + self._chunk]) for name, array in weights.items()})
            for first in range(0, self._classes, self._chunk)
        ]

    def use(self, tensors: Mapping[str, Array]) -> None:
        """Nothing of an adapter is read here."""

    def logits(self, rows: Array) -> Array:
        """Logits of every row, shape (n, vocabulary)."""
        found = np.empty((len(rows), self._classes), dtype=np.float32)
        for part in self._parts(len(rows)):
            given = self._given(self._normed(rows[part]), None)
            for first, weights in self._chunks:
                made = self._session(("logits",)).run(given, weights)["logits"].numpy()
                found[part, first : first + made.shape[1]] = made
        return found

    def score(self, rows: Array, labels: Array) -> Score:
        """Loss and correct predictions of the rows; a label that shares the largest logit counts as predicted."""
        total = Score()
        for part in self._parts(len(rows)):
            total += _score(self._pass(self._normed(rows[part]), labels[part], _LOSS))
        return total

    def gradients(
        self, rows: Array, labels: Array, *, rows_wanted: bool, params_wanted: bool
    ) -> tuple[Score, Array, dict[str, Array]]:
        """Score and gradient of the mean loss for the rows, shape (n, width)."""
        if not rows_wanted:
            return self.score(rows, labels), np.zeros_like(rows), {}
        total, d_rows = Score(), np.empty_like(rows)
        for part in self._parts(len(rows)):
            state = self._pass(self._normed(rows[part]), labels[part], _GRADIENT)
            total += _score(state)
            d_normed = state["pull"]
            d_normed /= state["total"]
            d_normed -= state["target"]
            d_normed *= np.float32(1 / len(rows))
            given = {"rows": _bound(rows[part]), "d_normed": _bound(d_normed)}
            d_rows[part] = self._norm_backward.run(given, self._norm_weights)["d_rows"].numpy()
        return total, d_rows, {}

    def _normed(self, rows: Array) -> ort.OrtValue:
        return self._norm.run({"rows": _bound(rows)}, self._norm_weights)["normed"]

    def _pass(self, normed: ort.OrtValue, labels: Array, names: Sequence[str]) -> dict[str, Array]:
        """What is left after all chunks, by name."""
        session = self._session(tuple(f"next_{name}" for name in names))
        count, width = normed.shape()
        state = {
            name: _bound(np.zeros((count, width if name in ("pull", "target") else 1), np.float32)) for name in names
        }
        state["top"] = _bound(np.full((count, 1), _LOWEST))
        for first, weights in self._chunks:
            made = session.run(self._given(normed, labels - first), state, weights)
            state = {name: made[f"next_{name}"] for name in names}
        return {name: value.numpy() for name, value in state.items()}

    def _given(self, normed: ort.OrtValue, labels: Array | None) -> OrtValues:
        if labels is None:
            return {"normed": normed}
        inside = (labels >= 0) & (labels < self._chunk)
        return {
            "normed": normed,
            "labels": _bound(np.where(inside, labels, 0)),
            "inside": _bound(inside[:, None]),
        }

    def _parts(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self._rows):
            yield slice(start, min(start + self._rows, count))

    def _session(self, outputs: tuple[str, ...]) -> Session:
        if outputs not in self._sessions:
            self._sessions[outputs] = Session(self._graph, outputs)
        return self._sessions[outputs]


def _bound(array: Array) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def _score(state: Mapping[str, Array]) -> Score:
    top, gold = state["top"], state["gold"]
    losses = top + np.log(state["total"]) - gold
    return Score(float(losses.sum(dtype=np.float64)), int((gold >= top).sum()), len(top))
