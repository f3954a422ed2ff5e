"""The variants of one block kind, derived when first needed and shared by all blocks of the kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnxruntime as ort

from edge_runtime.bundle import BlockKind
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.graph import JointGraph
from edge_runtime.engine.runtime import open_session

OrtValues = dict[str, ort.OrtValue]


@dataclass(frozen=True)
class Variant:
    """What a block's backward pass must make.

    Attributes:
        alive: Alive factors as (slot, "A" | "B").
        input_gradient: Whether the gradient of the block's input is wanted; not for the lowest alive block.
        keep: Whether activations are kept from the forward pass, or recomputed from the block's input.
    """

    alive: frozenset[tuple[str, str]]
    input_gradient: bool
    keep: bool

    def gradient_names(self) -> tuple[str, ...]:
        """Graph outputs of the backward pass, the factors in sorted order, then the input's."""
        names = tuple(f"d_lora_{factor.lower()}:{slot}" for slot, factor in sorted(self.alive))
        return (*names, "d_hidden") if self.input_gradient else names


class Session:
    """A session that takes more inputs than it needs: each variant reads only some of the block's tensors."""

    def __init__(self, graph: JointGraph, outputs: Sequence[str], given: Sequence[str] = ()) -> None:
        """Derive the graph of ``outputs`` from ``graph`` and open a session on it."""
        self.outputs = tuple(outputs)
        self._session = open_session(graph.derive(outputs, given).SerializeToString())
        self.inputs = tuple(value.name for value in self._session.get_inputs())

    def run(self, *sources: Mapping[str, ort.OrtValue]) -> OrtValues:
        """Run with each input taken from the first source that has it.

        Raises:
            EngineInputError: no source has an input.
        """
        feeds = {}
        for name in self.inputs:
            for source in sources:
                if name in source:
                    feeds[name] = source[name]
                    break
            else:
                raise EngineInputError(f"block graph: nothing given for input {name!r}")
        return dict(zip(self.outputs, self._session.run_with_ort_values(self.outputs, feeds), strict=True))


class BlockVariants:
    """All sessions of one block kind."""

    def __init__(self, kind: BlockKind, graph: JointGraph) -> None:
        """Nothing is derived yet."""
        self.kind = kind
        self.graph = graph
        self._sessions: dict[tuple[str, Variant | None], Session] = {}

    def forward(self) -> Session:
        """Makes ``out`` and nothing else."""
        return self._cached("forward", None, lambda: Session(self.graph, ("out",)))

    def forward_keeping(self, variant: Variant) -> Session:
        """Makes ``out`` and the activations that :meth:`backward` of the same variant reads."""
        outputs = dict.fromkeys(("out", *self._kept(variant)))  # backward may read the output itself
        return self._cached("keep", variant, lambda: Session(self.graph, tuple(outputs)))

    def backward(self, variant: Variant) -> Session:
        """Makes the variant's gradients from ``d_out`` and either the kept activations or the block's input."""
        given = self._kept(variant) if variant.keep else ()
        return self._cached("backward", variant, lambda: Session(self.graph, variant.gradient_names(), given))

    def _kept(self, variant: Variant) -> tuple[str, ...]:
        return self.graph.boundary(("out",), variant.gradient_names())

    def _cached(self, role: str, variant: Variant | None, make: Callable[[], Session]) -> Session:
        key = (role, variant)
        if key not in self._sessions:
            self._sessions[key] = make()
        return self._sessions[key]
