"""The engine that runs artifacts of onnxruntime-training.

With every tensor of the adapter alive at full rank it runs the bundle's own ``training_model.onnx`` and ``checkpoint``.
For any other plan it makes the two again from ``eval_model.onnx``: the new training model has gradients for the alive
tensors only, the new checkpoint holds only these, and the frozen weights and dead factors are fed as inputs from the
memory they are in already.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edge_runtime.bundle import CHECKPOINT, EVALUATION_MODEL, TRAINING_MODEL, Array, Bundle, adapter_shapes
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.interface import Gradients, Score, TokenBatch
from edge_runtime.engine.ort_training.artifacts import CORRECT, LOGITS, LOSS, training_model, write_checkpoint
from edge_runtime.engine.ort_training.bindings import graph_errors, load_bindings, session_options
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.engine.remembered import RememberedHidden

_INPUTS = ("input_ids", "attention_mask", "rows", "labels")


class OrtTrainingEngine:
    """Implements :class:`edge_runtime.engine.interface.Engine` on onnxruntime-training.

    It keeps the activations of the whole model between forward and backward and has no memory budget.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Load a bundle's checkpoint.

        Args:
            bundle: A bundle whose engine is ``ort-training``.
            threads: CPU threads, None for one a core.

        Raises:
            EngineMissingError: no onnxruntime-training here.
            GraphError: the checkpoint or the evaluation model is unreadable.
        """
        self._bundle = bundle
        self._manifest = bundle.manifest
        self._bindings = load_bindings()
        self._threads = threads
        self._shapes = adapter_shapes(self._manifest, dict.fromkeys(self._manifest.module_names, self._manifest.r_max))
        with graph_errors("bundle: onnxruntime-training cannot load it"):
            self._state = self._bindings.load_checkpoint(str(bundle.path(CHECKPOINT)))
            options = session_options(threads)
            path = str(bundle.path(EVALUATION_MODEL))
            self._evaluation = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        # Everything that is fed, by name: the checkpoint's own memory, and below the adapter's arrays.
        self._values = {
            name: ort.OrtValue(self._state.get_parameter(name).data)
            for name in self._state.parameter_names()
            if name not in self._shapes
        }
        self._parameters: AdapterParameters | None = None
        self._trainer: _Trainer | None = None

    def use(self, parameters: AdapterParameters, remembered: RememberedHidden | None = None) -> None:
        """Take this adapter and alive set; artifacts for it are made at the first call of :meth:`gradients`.

        Nothing is remembered: the artifacts compute the whole model.

        Raises:
            EngineInputError: an adapter tensor is missing, or an alive name is none of the bundle's.
        """
        absent = sorted(set(self._shapes) - set(parameters.tensors))
        if absent:
            raise EngineInputError(f"adapter: no tensor {absent[0]} ({len(absent)} missing)")
        stray = sorted(parameters.alive - set(self._shapes))
        if stray:
            raise EngineInputError(f"adapter: alive tensors are not of this bundle: {stray[:3]}")
        self._parameters = parameters
        self._values |= {name: ort.OrtValue.ortvalue_from_numpy(parameters.tensors[name]) for name in self._shapes}
        self._trainer = None

    def gradients(self, batch: TokenBatch) -> Gradients:
        """Loss and the gradient of the mean loss for every alive tensor.

        Raises:
            EngineInputError: no adapter is in use, or nothing in it is alive.
            GraphError: no artifacts can be made for its alive set.
        """
        parameters = self._in_use()
        if not parameters.alive:
            raise EngineInputError("adapter: nothing is alive, so there is nothing to train")
        if self._trainer is None:
            self._trainer = self._make_trainer(parameters)
        loss, correct, found = self._trainer.step({**self._values, **_inputs(batch)})
        return Gradients(_score(loss, correct, batch), found)

    def evaluate(self, batch: TokenBatch) -> Score:
        """Loss and correct predictions; nothing is kept."""
        loss, correct = self._run((LOSS, CORRECT), batch)
        return _score(loss, correct, batch)

    def logits(self, batch: TokenBatch) -> Array:
        """Logits of the batch's rows, shape (n, classes)."""
        return np.asarray(self._run((LOGITS,), batch)[0])

    def _in_use(self) -> AdapterParameters:
        if self._parameters is None:
            raise EngineInputError("adapter: none in use")
        return self._parameters

    def _run(self, outputs: Sequence[str], batch: TokenBatch) -> list[Any]:
        self._in_use()
        given = {**self._values, **_inputs(batch)}
        feeds = {item.name: given[item.name] for item in self._evaluation.get_inputs()}
        return [value.numpy() for value in self._evaluation.run_with_ort_values(outputs, feeds)]

    def _make_trainer(self, parameters: AdapterParameters) -> _Trainer:
        alive = {name: parameters.tensors[name] for name, _ in parameters.layout.blocks if name in parameters.alive}
        options = session_options(self._threads)
        if {name: array.shape for name, array in alive.items()} == self._shapes:
            return _Trainer(self._bindings, self._bundle.path(TRAINING_MODEL), self._state, alive, options)
        import onnx

        evaluation = onnx.load_model(self._bundle.path(EVALUATION_MODEL))
        with tempfile.TemporaryDirectory(prefix="emberlora-") as folder:  # the bindings read files only
            model, checkpoint = Path(folder) / "training_model.onnx", Path(folder) / "checkpoint"
            model.write_bytes(training_model(evaluation, tuple(alive)).SerializeToString())
            write_checkpoint(checkpoint, alive, {})
            return _Trainer(self._bindings, model, self._bindings.load_checkpoint(str(checkpoint)), alive, options)


class _Trainer:
    """The package's ``Module`` for one alive set."""

    def __init__(
        self, bindings: Any, model: Path, state: Any, alive: dict[str, Array], options: ort.SessionOptions
    ) -> None:
        self._bindings = bindings
        self._alive = alive
        self._state = state
        cpu = bindings.OrtDevice(bindings.OrtDevice.cpu(), bindings.OrtDevice.default_memory(), 0)
        with graph_errors(f"{model.name}: onnxruntime-training cannot load it"):
            self._module = bindings.Module(str(model), state, None, cpu, options)
        self._inputs: list[str] = self._module.input_names(True)

    def step(self, given: dict[str, ort.OrtValue]) -> tuple[Any, Any, dict[str, Array]]:
        """Mean loss (), correct predictions () and the gradient of the mean loss for every alive tensor."""
        for name, array in self._alive.items():
            self._state.copy_parameter_from(name, ort.OrtValue.ortvalue_from_numpy(array)._ortvalue)
        feeds, fetched = self._bindings.OrtValueVector(), self._bindings.OrtValueVector()
        feeds.reserve(len(self._inputs))
        for name in self._inputs:
            feeds.push_back(given[name]._ortvalue)
        self._module.train_step_with_ort_values(feeds, fetched)
        # The buffers are written over by the next step.
        found = {name: self._state.get_parameter(name).grad.numpy().copy() for name in self._alive}
        self._module.lazy_reset_grad()
        return fetched[0].numpy(), fetched[1].numpy(), found


def _inputs(batch: TokenBatch) -> dict[str, ort.OrtValue]:
    return {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(getattr(batch, name))) for name in _INPUTS}


def _score(loss: Any, correct: Any, batch: TokenBatch) -> Score:
    return Score(float(loss) * len(batch.rows), int(correct), len(batch.rows))
