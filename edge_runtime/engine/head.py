"""The head of a classifier: selected rows of the last hidden state to loss and gradients, in bounded chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnxruntime as ort

from edge_runtime.bundle import Array, Head
from edge_runtime.engine.block import OrtValues, Session
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.graph import JointGraph
from edge_runtime.engine.interface import Score, TokenBatch

# Logits of one chunk take at most this much; cross-entropy needs about three arrays of that size.
_CHUNK_BYTES = 16 << 20


class ClassHead:
    """Runs the head graph over chunks of rows and adds up what it says."""

    def __init__(self, head: Head, graph: JointGraph, weights: OrtValues, classes: int) -> None:
        """Args: the manifest's head, its graph, frozen weights as ``w:{name}``, and the width of the logits."""
        self._head = head
        self._graph = graph
        self._weights = weights
        self._chunk = max(16, _CHUNK_BYTES // (4 * classes))
        self._params: OrtValues = {}
        self._sessions: dict[tuple[str, ...], Session] = {}

    def use(self, tensors: Mapping[str, Array]) -> None:
        """Take the trained parameters from an adapter's tensors."""
        self._params = {
            f"p:{param.name}": ort.OrtValue.ortvalue_from_numpy(tensors[f"{self._head.module}.{param.name}"])
            for param in self._head.params
        }

    def logits(self, rows: Array) -> Array:
        """Logits of every row, shape (n, classes)."""
        return self._logits(rows, self._params)

    def features(self, rows: Array) -> Array:
        """What enters the trained linear layer for every row, shape (n, features), bit for bit.

        ``logits`` are ``features · weightᵀ + bias``, so with unit rows as weight and no bias they are the features
        themselves, as many at once as there are classes. This asks nothing of the graph but its contract.

        Raises:
            EngineInputError: the head is not one linear layer with a bias.
        """
        if self._head.linear is None:
            raise EngineInputError("head: not one linear layer with a bias, so nothing is known of what enters it")
        classes, features = self._head.linear
        no_bias = ort.OrtValue.ortvalue_from_numpy(np.zeros(classes, np.float32))
        parts = []
        for start in range(0, features, classes):
            units = np.eye(classes, features, start, dtype=np.float32)  # those beyond the last feature are zero
            parts.append(self._logits(rows, {"p:weight": ort.OrtValue.ortvalue_from_numpy(units), "p:bias": no_bias}))
        return np.concatenate(parts, axis=1)[:, :features]

    def score(self, rows: Array, labels: Array) -> Score:
        """Loss and correct predictions of the rows."""
        total = Score()
        for part in self._parts(len(rows)):
            total += _score(self._run(("loss_sum", "correct"), rows[part], labels[part], 1.0, self._params), part)
        return total

    def gradients(
        self, rows: Array, labels: Array, *, rows_wanted: bool, params_wanted: bool
    ) -> tuple[Score, Array, dict[str, Array]]:
        """Score, gradient of the mean loss for the rows (n, width), and for the trained parameters by adapter name."""
        params = [param.name for param in self._head.params] if params_wanted else []
        outputs = ("loss_sum", "correct", *(f"d_p:{name}" for name in params), *(["d_rows"] if rows_wanted else []))
        total, d_rows = Score(), np.zeros_like(rows)
        sums: dict[str, Array] = {}
        for part in self._parts(len(rows)):
            made = self._run(outputs, rows[part], labels[part], 1.0 / len(rows), self._params)
            total += _score(made, part)
            if rows_wanted:
                d_rows[part] = made["d_rows"].numpy()
            for name in params:
                gradient = made[f"d_p:{name}"].numpy()
                key = f"{self._head.module}.{name}"
                sums[key] = sums[key] + gradient if key in sums else gradient
        return total, d_rows, sums

    def _parts(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self._chunk):
            yield slice(start, min(start + self._chunk, count))

    def _logits(self, rows: Array, params: OrtValues) -> Array:
        parts = []
        for part in self._parts(len(rows)):
            labels = np.zeros(part.stop - part.start, dtype=np.int64)
            parts.append(self._run(("logits",), rows[part], labels, 1.0, params)["logits"].numpy())
        return np.concatenate(parts)

    def _run(
        self, outputs: tuple[str, ...], rows: Array, labels: Array, grad_scale: float, params: OrtValues
    ) -> OrtValues:
        if outputs not in self._sessions:
            self._sessions[outputs] = Session(self._graph, outputs)
        feeds = {
            "rows": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(rows)),
            "labels": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(labels)),
            "grad_scale": ort.OrtValue.ortvalue_from_numpy(np.asarray(grad_scale, dtype=np.float32)),
        }
        return self._sessions[outputs].run(feeds, params, self._weights)


def select_rows(hidden: Array, batch: TokenBatch) -> Array:
    """The rows of the last hidden state (b, s, width) that the head sees, shape (n, width)."""
    return hidden.reshape(-1, hidden.shape[-1])[batch.rows]


def scatter_rows(d_rows: Array, batch: TokenBatch, shape: tuple[int, ...]) -> Array:
    """The gradient of the last hidden state: ``d_rows`` (n, width) where the head looked, zero elsewhere."""
    d_hidden = np.zeros((shape[0] * shape[1], shape[2]), dtype=np.float32)
    d_hidden[batch.rows] = d_rows
    return d_hidden.reshape(shape)


def example_importance(d_rows: Array, batch: TokenBatch) -> Array:
    """How much each example pulls, shape (b,), see :class:`edge_runtime.engine.interface.Gradients`.

    Args:
        d_rows: The gradient of the batch's mean loss by the rows, shape (n, width).
        batch: Every example of it has a row.
    """
    owner = batch.rows // batch.input_ids.shape[1]
    own = np.linalg.norm(d_rows, axis=1) * len(d_rows)  # of its own loss: the mean's holds a part of it
    examples = len(batch.input_ids)
    sums = np.bincount(owner, weights=own, minlength=examples)
    return (sums / np.bincount(owner, minlength=examples)).astype(np.float32)


def _score(made: OrtValues, part: slice) -> Score:
    return Score(float(made["loss_sum"].numpy()), int(made["correct"].numpy()), part.stop - part.start)
