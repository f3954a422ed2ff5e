"""The step's matrix products alone, in stock ONNX Runtime: the floor that a step stands on.

One graph a stage, so that Python costs nothing that counts; every operand contiguous, every result written into memory
that exists already. The model's weights are the distinct mapped arrays of its file, as the engine has them, or packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from bench.products import Product, Products, Role, Sizes, Stage, step_stages
from bench.shapes import HEAD_CHUNK, MODELS, RANK, SLOTS, Shape, module_name
from bench.systems import Setup
from edge_runtime.bundle import Array, map_tensors

_CONTRIB = "com.microsoft"
_STORED: tuple[Role, ...] = ("frozen", "head")  # roles whose weight can be packed; factors change at every step


def products_alone(setup: Setup) -> Any:
    """Run every product of a step, without gradients; see :data:`bench.contestant.Made`."""
    shape = MODELS[setup.shape]
    stages = step_stages(
        shape,
        setup.batch,
        setup.tokens,
        setup.factors,
        recompute=setup.setting.activations == "recompute",
        remembered=setup.setting.lower == "remembered",
    )
    ort.set_default_logger_severity(3)
    ort.set_global_thread_pool_sizes(setup.threads, 1)
    runner = _Runner(_Weights(shape, Path(setup.model)), packed=setup.setting.weights == "packed")
    calls = [runner.call(stage) for stage in stages]

    def step() -> None:
        for call in calls:
            call()

    return step, {}


class _Weights:
    """The model's tensors by stage: frozen ones mapped from its file, LoRA factors drawn, the head a slice a chunk."""

    def __init__(self, shape: Shape, folder: Path) -> None:
        self._mapped = map_tensors(folder / "model.safetensors")
        rng = np.random.default_rng(0)
        self._factors: dict[str, Array] = {}
        for block in range(shape.layers):
            for slot in SLOTS:
                inside, outside = shape.features(slot)
                name = module_name(block, slot)
                self._factors[f"{name}.lora_a"] = rng.standard_normal((RANK, inside), dtype=np.float32)
                self._factors[f"{name}.lora_b"] = rng.standard_normal((outside, RANK), dtype=np.float32)

    def get(self, block: int | None, product: Product) -> Array:
        if block is None:
            start = int(product.weight)
            return self._mapped["model.embed_tokens.weight"][start : start + HEAD_CHUNK]
        name = module_name(block, product.weight)
        return self._factors[name] if product.role == "lora" else self._mapped[name]


class _Runner:
    """Turns stages into calls; stages with the same products share a session when nothing is packed."""

    def __init__(self, weights: _Weights, *, packed: bool) -> None:
        self._weights = weights
        self._packed = packed
        self._rng = np.random.default_rng(1)
        self._sessions: dict[Products, ort.InferenceSession] = {}
        self._held: dict[tuple[str, Sizes], ort.OrtValue] = {}

    def call(self, stage: Stage) -> Callable[[], None]:
        """A function that runs the stage's products."""
        constants = {
            f"w{place}": self._weights.get(stage.block, product)
            for place, product in enumerate(stage.products)
            if self._packed and product.role in _STORED
        }
        session = _open(stage.products, constants) if constants else self._shared(stage.products)
        binding = session.io_binding()
        for place, product in enumerate(stage.products):
            binding.bind_ortvalue_input(f"l{place}", self._activation("left", product.left))
            if f"w{place}" not in constants:
                binding.bind_ortvalue_input(f"w{place}", self._right(stage.block, product))
            binding.bind_ortvalue_output(f"o{place}", self._activation("out", product.out))
        return lambda: session.run_with_iobinding(binding)

    def _shared(self, products: Products) -> ort.InferenceSession:
        if products not in self._sessions:
            self._sessions[products] = _open(products, {})
        return self._sessions[products]

    def _right(self, block: int | None, product: Product) -> ort.OrtValue:
        if not product.weight:
            return self._activation("right", product.right)
        return ort.OrtValue.ortvalue_from_numpy(self._weights.get(block, product))

    def _activation(self, side: str, shape: Sizes) -> ort.OrtValue:
        """Operands of one shape are one array, as a step's activations are when the next layer reads them."""
        if (side, shape) not in self._held:
            values = self._rng.standard_normal(shape, dtype=np.float32)
            self._held[side, shape] = ort.OrtValue.ortvalue_from_numpy(values)
        return self._held[side, shape]


def stage_model(products: Sequence[Product], constants: Mapping[str, Array]) -> onnx.ModelProto:
    """Products as a graph of independent nodes: inputs ``l{n}`` and ``w{n}``, outputs ``o{n}``.

    Args:
        products: In the order in which they run.
        constants: Values of those ``w{n}`` that are no inputs, so that the session packs them.
    """
    nodes, inputs, outputs, initializers = [], [], [], []
    for place, product in enumerate(products):
        names = (f"l{place}", f"w{place}")
        kind, domain = ("FusedMatMul", _CONTRIB) if product.copies else ("Gemm", "")
        flips = {"transA": int(product.flip_left), "transB": int(product.flip_right)}
        nodes.append(helper.make_node(kind, names, [f"o{place}"], domain=domain, **flips))
        inputs.append(helper.make_tensor_value_info(names[0], TensorProto.FLOAT, product.left))
        if names[1] in constants:
            initializers.append(numpy_helper.from_array(constants[names[1]], names[1]))
        else:
            inputs.append(helper.make_tensor_value_info(names[1], TensorProto.FLOAT, product.right))
        outputs.append(helper.make_tensor_value_info(f"o{place}", TensorProto.FLOAT, product.out))
    graph = helper.make_graph(nodes, "products", inputs, outputs, initializers)
    versions = [helper.make_opsetid("", 20), helper.make_opsetid(_CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10)


def _open(products: Products, constants: Mapping[str, Array]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    # Two products on the same operands would be merged into one.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = stage_model(products, constants)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
