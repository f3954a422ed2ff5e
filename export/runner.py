"""Runs a bundle's graphs in the plainest way, to check them: every block whole, nothing cached, nothing skipped."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from edge_runtime.bundle import Array, Bundle


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

    def __init__(self, bundle: Bundle) -> None:
        self.manifest, self.weights = bundle.manifest, bundle.weights()
        files = {kind.graph for kind in self.manifest.kinds} | {self.manifest.embed.graph, self.manifest.head.graph}
        self.sessions = {name: open_session(str(bundle.path(name))) for name in files}

    def gradients(
        self, batch: Batch, adapter: Mapping[str, Array], scales: Mapping[str, float], grad_scale: float
    ) -> tuple[float, dict[str, Array]]:
        """Loss (summed, nats) and the gradient of ``grad_scale`` · loss for every adapter tensor, by its name."""
        manifest = self.manifest
        given = {"input_ids": batch.ids, "attention_mask": batch.mask, **self._weights(manifest.embed.weights)}
        embedded = self._run(manifest.embed.graph, given, None)
        hidden = [embedded["hidden"]]
        for index in range(len(manifest.blocks)):
            inputs = self._block(index, hidden[-1], embedded, adapter, scales)
            hidden.append(self._run(manifest.kind_of(index).graph, inputs, ["out"])["out"])

        rows, labels = batch.targets()
        inputs = {"rows": hidden[-1][rows], "labels": labels, "grad_scale": np.asarray(grad_scale, np.float32)}
        inputs |= self._weights(manifest.head.weights)
        inputs |= {f"p:{param.name}": adapter[f"{manifest.head.module}.{param.name}"] for param in manifest.head.params}
        head = self._run(manifest.head.graph, inputs, None)
        grads = {f"{manifest.head.module}.{param.name}": head[f"d_p:{param.name}"] for param in manifest.head.params}

        d_out = np.zeros_like(hidden[-1])
        d_out[rows] = head["d_rows"]
        for index in reversed(range(len(manifest.blocks))):
            inputs = self._block(index, hidden[index], embedded, adapter, scales) | {"d_out": d_out}
            found = self._run(manifest.kind_of(index).graph, inputs, None)
            d_out = found["d_hidden"]
            for slot in manifest.kind_of(index).slots:
                for factor in ("lora_a", "lora_b"):
                    grads[f"{manifest.blocks[index].prefix}.{slot.name}.{factor}"] = found[f"d_{factor}:{slot.name}"]
        return float(head["loss_sum"]), grads

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
        inputs |= self._weights(kind.weights, f"{prefix}.")
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
