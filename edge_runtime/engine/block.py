"""The variants of one block kind, derived when first needed and shared by all blocks of the kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

from edge_runtime.bundle import BlockKind, Bundle, FastForm
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.graph import InFile, JointGraph
from edge_runtime.engine.runtime import open_session

LONG_TOKENS = 256  # from here on a kind's graph for long sequences is the faster one

OrtValues = dict[str, ort.OrtValue]
_OPTIONS = ort.RunOptions()


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


@dataclass(frozen=True)
class Packed:
    """Weights of one block that sessions hold packed for their products instead of reading them as inputs."""

    folder: Path
    constants: Mapping[str, InFile]  # by graph input


class Session:
    """A session that takes more inputs than it needs: each variant reads only some of the block's tensors."""

    def __init__(
        self, graph: JointGraph, outputs: Sequence[str], given: Sequence[str] = (), packed: Packed | None = None
    ) -> None:
        """Derive the graph of ``outputs`` from ``graph`` and open a session on it."""
        self.outputs = tuple(outputs)
        model = graph.derive(outputs, given, packed.constants if packed else None)
        self._session = open_session(model.SerializeToString(), packed.folder if packed else None)
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        # Strings and devices as the compiled run wants them, made once.
        self._names = list(self.inputs), list(self.outputs)
        self._devices = [ort.OrtDevice.make("cpu", 0)._get_c_device()] * len(self.outputs)

    def run(self, *sources: Mapping[str, ort.OrtValue]) -> OrtValues:
        """Run with each input taken from the first source that has it.

        Raises:
            EngineInputError: no source has an input.
        """
        feeds = OrtValueVector()
        feeds.reserve(len(self.inputs))
        for name in self.inputs:
            for source in sources:
                if name in source:
                    feeds.push_back(source[name]._ortvalue)  # what the vector holds; the runtime offers no other way
                    break
            else:
                raise EngineInputError(f"block graph: nothing given for input {name!r}")
        made = OrtValueVector()
        inputs, outputs = self._names
        # run_with_ort_values checks every name against a list of all, and costs 2 to 3 % of a step on short batches.
        self._session.run_with_ortvaluevector(_OPTIONS, inputs, feeds, outputs, made, self._devices)
        return {name: ort.OrtValue(made[place]) for place, name in enumerate(outputs)}


class BlockVariants:
    """All sessions of one graph of a block kind, or of a single block whose weights are packed."""

    def __init__(self, kind: BlockKind, graph: JointGraph, packed: Packed | None = None) -> None:
        """Nothing is derived yet."""
        self.kind = kind
        self.graph = graph
        self._packed = packed
        self._sessions: dict[tuple[str, Variant | None], Session] = {}
        self._boundaries: dict[Variant, tuple[str, ...]] = {}

    def forward(self) -> Session:
        """Makes ``out`` and nothing else."""
        return self._cached("forward", None, lambda: self._session(("out",)))

    def forward_keeping(self, variant: Variant) -> Session:
        """Makes ``out`` and the activations that :meth:`backward` of the same variant reads."""
        # Backward may read the output itself, which is made once.
        return self._cached("keep", variant, lambda: self._session(tuple(dict.fromkeys(("out", *self._kept(variant))))))

    def backward(self, variant: Variant) -> Session:
        """Makes the variant's gradients from ``d_out`` and either the kept activations or the block's input."""
        return self._cached(
            "backward",
            variant,
            lambda: self._session(variant.gradient_names(), self._kept(variant) if variant.keep else ()),
        )

    def _session(self, outputs: Sequence[str], given: Sequence[str] = ()) -> Session:
        return Session(self.graph, outputs, given, self._packed)

    def _kept(self, variant: Variant) -> tuple[str, ...]:
        if variant not in self._boundaries:
            self._boundaries[variant] = self.graph.boundary(("out",), variant.gradient_names())
        return self._boundaries[variant]

    def _cached(self, role: str, variant: Variant | None, make: Callable[[], Session]) -> Session:
        key = (role, variant)
        if key not in self._sessions:
            self._sessions[key] = make()
        return self._sessions[key]


@dataclass(frozen=True)
class BlockForms:
    """The variants of a block kind for short sequences and for long ones; the same where it has one graph for both."""

    short: BlockVariants
    long: BlockVariants

    @classmethod
    def load(cls, bundle: Bundle, kind: BlockKind, form: BlockKind | FastForm) -> BlockForms:
        """Read the graphs of a kind or of its fast form.

        Raises:
            GraphError: one is unreadable.
        """
        short = BlockVariants(kind, JointGraph.load(bundle.path(form.graph)))
        return cls(short, BlockVariants(kind, JointGraph.load(bundle.path(form.long))) if form.long else short)

    def packed(self, weights: Packed) -> BlockForms:
        """The same for a single block, its weights packed."""
        short = BlockVariants(self.short.kind, self.short.graph, weights)
        return BlockForms(
            short, short if self.long is self.short else BlockVariants(self.long.kind, self.long.graph, weights)
        )

    def of(self, hidden: ort.OrtValue) -> BlockVariants:
        """For a hidden state (batch, seq, width)."""
        return self.long if hidden.shape()[1] >= LONG_TOKENS else self.short
