"""From a torch function to one ONNX graph: capture with symbolic sizes, export, translate.

The only module that uses torch's tracing internals; known to work with torch 2.13, onnxscript 0.7 and onnx 1.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from export.errors import ExportError, TraceError
from export.quiet import quiet

OPSET = 20
BATCH, SEQ, ROWS = "batch", "seq", "rows"
HIDDEN, D_OUT, OUT, D_HIDDEN = "hidden", "d_out", "out", "d_hidden"  # of a block graph
# Example sizes: distinct primes, because equal sizes would be taken for one symbol, and 0 or 1 for a constant.
SIZES = {BATCH: 3, SEQ: 7, ROWS: 5}
_RANKS = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113)
_LONGEST = 1 << 20

_aten = torch.ops.aten


@dataclass(frozen=True)
class Input:
    """A graph input: its name, an example, and the symbolic dimension on each axis that has one."""

    name: str
    example: Any
    dims: Mapping[int, str] = field(default_factory=dict)


def example_rank(slot: int) -> int:
    """The example size of the rank of slot number ``slot``; distinct for every slot.

    Raises:
        TraceError: a block with more linear layers than expected.
    """
    if slot >= len(_RANKS):
        raise TraceError(f"block: too many LoRA slots: expected at most {len(_RANKS)}, got more")
    return _RANKS[slot]


def trace(function: Callable[..., tuple[Any, ...]], inputs: Sequence[Input], outputs: Sequence[str]) -> Any:
    """Trace ``function`` to an ONNX model; autograd calls inside are traced through.

    Args:
        function: Takes the inputs' tensors in order, returns one tensor per name in ``outputs``.
        inputs: Examples with the sizes of :data:`SIZES` and :func:`example_rank` on symbolic axes.
        outputs: Names of the results.

    Returns:
        An ``onnx.ModelProto`` as the exporter made it, value shapes included.

    Raises:
        TraceError: the function cannot be captured or translated, or the graph comes out empty.
    """
    try:
        with quiet():
            module = _capture(function, inputs)
            program = _exported(module, inputs)
            made = torch.onnx.export(
                program,
                dynamo=True,
                optimize=True,
                opset_version=OPSET,
                input_names=[item.name for item in inputs],
                output_names=list(outputs),
                verbose=False,
            )
    except ExportError:
        raise
    except Exception as error:
        raise TraceError(f"tracing {outputs[0]}: {type(error).__name__}: {_first_line(error)}") from error
    model = made.model_proto
    if not model.graph.node:  # torch.onnx.export can return an empty graph without an error
        raise TraceError(f"tracing {outputs[0]}: the exported graph has no nodes")
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:300]


def _capture(function: Callable[..., tuple[Any, ...]], inputs: Sequence[Input]) -> Any:
    """Record the function's operators with symbolic sizes only on the axes that have a name.

    With every axis symbolic (``tracing_mode="symbolic"``) the shape guards of attention cannot be solved.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = []
    for number, item in enumerate(inputs):
        kinds = [DimDynamic.DUCK if axis in item.dims else DimDynamic.STATIC for axis in range(item.example.dim())]
        context = StatelessSymbolicContext(dynamic_sizes=kinds, constraint_sizes=[None] * len(kinds))
        source = ConstantSource(f"input{number}")
        fakes.append(mode.from_tensor(item.example.detach(), source=source, symbolic_context=context))
    with mode, enable_python_dispatcher():
        module = make_fx(function, tracing_mode="real", decomposition_table=_decompositions())(*fakes)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _exported(module: Any, inputs: Sequence[Input]) -> Any:
    names = {name for item in inputs for name in item.dims.values()}
    symbols = {name: Dim(name, min=1, max=_LONGEST) for name in names}
    shapes = tuple({axis: symbols[name] for axis, name in item.dims.items()} or None for item in inputs)
    return torch.export.export(
        module,
        tuple(item.example.detach() for item in inputs),
        dynamic_shapes=shapes,
        strict=False,
        # Views of grouped heads ask for min(seq, 2·seq²) == seq: true, but only provable at run time.
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Core ATen, with cheaper forms of what ONNX Runtime runs slowly or the translator does not know."""
    table = dict(core_aten_decompositions())
    table[_aten.silu.default] = lambda x: x * torch.sigmoid(x)  # F.silu leaves an empty_permuted behind
    table[_aten.silu_backward.default] = _silu_backward
    table[_aten.pow.Tensor_Scalar] = _power  # Pow(x, 2) costs as much as a small matrix product
    table[_aten.slice_backward.default] = _slice_backward
    table.pop(_aten.constant_pad_nd.default, None)
    return table


def _silu_backward(grad: Any, x: Any) -> Any:
    gate = torch.sigmoid(x)
    return grad * (gate * (1 + x * (1 - gate)))


def _power(x: Any, exponent: float) -> Any:
    products = {1: lambda: x, 2: lambda: x * x, 3: lambda: x * x * x}
    return products[int(exponent)]() if exponent in products else NotImplemented


def _slice_backward(grad: Any, sizes: Any, axis: int, start: int, end: int, step: int) -> Any:
    """A zero padding instead of a scatter into zeros."""
    if step != 1:
        return NotImplemented
    size = sizes[axis]
    end = min(end if end >= 0 else end + size, size)
    later = len(sizes) - 1 - axis % len(sizes)
    return _aten.constant_pad_nd.default(grad, [0, 0] * later + [start, size - end], 0.0)
