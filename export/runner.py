"""Runs a bundle's graphs in the plainest way, to check them: every block whole, nothing cached, nothing skipped."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from edge_runtime.bundle import SCALE_SUFFIX, Array, Bundle, int8_products


@dataclass(frozen=True)
class Batch:
    """Token ids and mask (batch, seq), int64, and for task ``classify`` one class id an example."""

    ids: Array
    mask: Array
    classes: Array | None = None

    def targets(self) -> tuple[tuple[Array, Array], Array]:
        """Positions (batch index, sequence index) of the rows that the head sees, and their labels."""
        if self.classes is not None:
            return (np.arange(len(self.ids)), np.zeros(len(self.ids), np.int64)), self.classes
        where = np.nonzero(self.mask[:, 1:])
        return (where[0], where[1]), self.ids[:, 1:][where]


class Runner:
    """A bundle's graphs as onnxruntime sessions."""

    def __init__(self, bundle: Bundle, *, fast: bool = False, long: bool = False) -> None:
        """``fast`` runs the blocks with int8 products, ``long`` those for long sequences where there are some."""
        self._fast, self._long = fast, long
        self.manifest, self.weights = bundle.manifest, bundle.weights()
        self.sessions = {name: open_session(str(bundle.path(name))) for name in self.manifest.graphs}

    def embedded(self, batch: Batch) -> dict[str, Array]:
        """The first hidden state, ``hidden`` (batch, seq, width), and what all blocks share."""
        embed = self.manifest.embed
        given = {"input_ids": batch.ids, "attention_mask": batch.mask, **self._weights(embed.weights)}
        return self._run(embed.graph, given, None)

    def whole_block(
        self, index: int, embedded: Mapping[str, Array], adapter: Mapping[str, Array], scales: Mapping[str, float]
    ) -> dict[str, Array]:
        """Every output of one block for the first hidden state, which stands for the gradient of its output too."""
        inputs = self._block(index, embedded["hidden"], embedded, adapter, scales) | {"d_out": embedded["hidden"]}
        return self._run(self._graph(index), inputs, None)

    def gradients(
        self, batch: Batch, adapter: Mapping[str, Array], scales: Mapping[str, float], grad_scale: float
    ) -> tuple[float, dict[str, Array]]:
        """Loss (summed, nats) and the gradient of ``grad_scale`` · loss for every adapter tensor, by its name."""
        manifest = self.manifest
        embedded = self.embedded(batch)
        hidden = [embedded["hidden"]]
        for index in range(len(manifest.blocks)):
            inputs = self._block(index, hidden[-1], embedded, adapter, scales)
            hidden.append(self._run(self._graph(index), inputs, ["out"])["out"])

        rows, labels = batch.targets()
        make = self._classify if manifest.head.vocabulary is None else self._predict
        loss, d_rows, grads = make(hidden[-1][rows], labels, adapter, grad_scale)

        d_out = np.zeros_like(hidden[-1])
        d_out[rows] = d_rows
        for index in reversed(range(len(manifest.blocks))):
            inputs = self._block(index, hidden[index], embedded, adapter, scales) | {"d_out": d_out}
            found = self._run(self._graph(index), inputs, None)
            d_out = found["d_hidden"]
            for slot in manifest.kind_of(index).slots:
                for factor in ("lora_a", "lora_b"):
                    grads[f"{manifest.blocks[index].prefix}.{slot.name}.{factor}"] = found[f"d_{factor}:{slot.name}"]
        return loss, grads

    def _classify(
        self, rows: Array, labels: Array, adapter: Mapping[str, Array], grad_scale: float
    ) -> tuple[float, Array, dict[str, Array]]:
        """Loss, gradient of the rows, gradients of the trained head."""
        head = self.manifest.head
        inputs = {"rows": rows, "labels": labels, "grad_scale": np.asarray(grad_scale, np.float32)}
        inputs |= self._weights(head.weights)
        inputs |= {f"p:{param.name}": adapter[f"{head.module}.{param.name}"] for param in head.params}
        made = self._run(head.graph, inputs, None)
        grads = {f"{head.module}.{param.name}": made[f"d_p:{param.name}"] for param in head.params}
        return float(made["loss_sum"]), made["d_rows"], grads

    def _predict(
        self, rows: Array, labels: Array, adapter: Mapping[str, Array], grad_scale: float
    ) -> tuple[float, Array, dict[str, Array]]:
        """Like :meth:`_classify`, over the vocabulary in three uneven chunks."""
        head = self.manifest.head
        vocabulary = head.vocabulary
        assert vocabulary is not None  # the caller looked
        norm: dict[str, Any] = {"rows": rows, "d_normed": np.zeros_like(rows), **self._weights(head.weights)}
        normed = self._run(head.graph, norm, ["normed"])["normed"]
        narrow, wide = np.zeros((len(rows), 1), np.float32), np.zeros_like(rows)
        state = {"top": narrow - 1e30, "total": narrow, "gold": narrow, "pull": wide, "target": wide}
        size = len(self.weights[vocabulary.weights[0]])
        edges = [0, size // 5, size // 2, size]
        for first, last in itertools.pairwise(edges):
            inputs: dict[str, Any] = {"normed": normed, **state}
            inputs |= {f"w:{name}": self.weights[name][first:last] for name in vocabulary.weights}
            inputs["inside"] = ((first <= labels) & (labels < last))[:, None]
            inputs["labels"] = np.clip(labels - first, 0, last - first - 1)
            made = self._run(vocabulary.graph, inputs, [f"next_{name}" for name in state])
            state = {name: made[f"next_{name}"] for name in state}
        loss = float((state["top"] + np.log(state["total"]) - state["gold"]).sum())
        norm["d_normed"] = grad_scale * (state["pull"] / state["total"] - state["target"])
        return loss, self._run(head.graph, norm, ["d_rows"])["d_rows"], {}

    def _graph(self, block: int) -> str:
        kind = self.manifest.kind_of(block)
        form = kind.fast if self._fast and kind.fast else kind
        return form.long if self._long and form.long else form.graph

    def _weights(self, names: tuple[str, ...], prefix: str = "") -> dict[str, Array]:
        return {f"w:{name}": self.weights[prefix + name] for name in names}

    def _block(
        self,
        index: int,
        hidden: Array,
        shared: Mapping[str, Array],
        adapter: Mapping[str, Array],
        scales: Mapping[str, float],
    ) -> dict[str, Any]:
        kind, prefix = self.manifest.kind_of(index), self.manifest.blocks[index].prefix
        inputs: dict[str, Any] = {"hidden": hidden, "d_out": np.zeros_like(hidden)}
        inputs |= {name: shared[name] for name in kind.shared}
        in_int8 = kind.fast.weights if self._fast and kind.fast else ()
        scales_of = {name + SCALE_SUFFIX for name in in_int8}
        inputs |= self._weights(tuple(n for n in kind.weights if n not in {*in_int8, *scales_of}), f"{prefix}.")
        for name in in_int8:
            # In 7 bits the products are right on every processor; a device uses all 8 where its own bears them.
            form = int8_products(f"{prefix}.{name}", self.weights, narrow=True)
            inputs |= {f"{part}:{name}": array for part, array in form.items()}
        for slot in kind.slots:
            module = f"{prefix}.{slot.name}"
            inputs[f"lora_a:{slot.name}"] = adapter[f"{module}.lora_a"]
            inputs[f"lora_b:{slot.name}"] = adapter[f"{module}.lora_b"]
            inputs[f"scale:{slot.name}"] = np.asarray(scales[module], np.float32)
        return inputs

    def _run(self, graph: str, inputs: Mapping[str, Any], outputs: list[str] | None) -> dict[str, Array]:
        session = self.sessions[graph]
        names = outputs or [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def open_session(model: str | bytes) -> Any:
    """A session on a file or on bytes, of its own threads or of the pool that the devices' engine made before."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # onnxruntime prints its failure before it raises
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except RuntimeError as error:
        if "use_per_session_threads must be false" not in str(error):  # ONNX Runtime offers no way to ask
            raise
    options.use_per_session_threads = False
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
