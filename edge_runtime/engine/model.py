"""The block engine: one training step over a bundle's graphs.

Forward block by block, head, backward block by block down to the lowest alive block and no further. For every alive
block the engine either keeps activations or keeps only the block's input and recomputes; a memory budget decides.
With int8 products both passes of a training step run the blocks' fast form; evaluation is always exact. What the blocks
below the lowest alive one make of an example may be remembered, and is then read instead of computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnxruntime as ort

from edge_runtime.bundle import Array, Bundle
from edge_runtime.engine.block import BlockForms, BlockVariants, OrtValues, Session, Variant
from edge_runtime.engine.budget import COPIES, Allowance, KeptSizes, packed_from, share_out
from edge_runtime.engine.errors import EngineInputError
from edge_runtime.engine.frozen import FrozenWeights, bind
from edge_runtime.engine.graph import JointGraph
from edge_runtime.engine.head import ClassHead, example_importance, scatter_rows, select_rows
from edge_runtime.engine.hidden_file import KEY_BYTES
from edge_runtime.engine.interface import Gradients, Score, TokenBatch
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.engine.remembered import Flags, RememberedHidden, Start
from edge_runtime.engine.runtime import choose_allocation
from edge_runtime.engine.vocabulary import VocabularyHead
from edge_runtime.wire import Products

# What the backward pass needs of each trained block, the lowest first: its number, its variant, and tensors by name.
Tape = list[tuple[int, Variant, OrtValues]]


class BlockEngine:
    """Implements :class:`edge_runtime.engine.interface.Engine` on stock ONNX Runtime."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        memory_budget_mb: float | None = None,
        products: Products = "exact",
        packed: bool = False,
    ) -> None:
        """Open a bundle's graphs and map its weights.

        Args:
            bundle: An opened bundle.
            memory_budget_mb: For resident weights and kept activations, in MiB (see :mod:`.budget`); None stands for
                60 % of the free memory, 0 keeps nothing, and exactly the weights' size keeps the weights alone.
            products: How training multiplies with frozen weights.
            packed: Whether sessions may hold copies of float32 weights in the order their products want. It saves up
                to a tenth of a step here, and takes two copies and a session for each block and variant, so a change of
                plan takes longer.

        Raises:
            GraphError: a graph is unreadable.
            BundleError: the weights are.
            EngineInputError: the bundle has no int8 products.
        """
        manifest = bundle.manifest
        self._manifest = manifest
        self._digest = bundle.digest
        weights = bundle.weights()
        allowance = share_out(memory_budget_mb, sum(array.nbytes for array in weights.values()))
        choose_allocation(tight=not allowance.resident)
        self._frozen = FrozenWeights(manifest, weights, resident=allowance.resident)
        self._kinds = {kind.name: BlockForms.load(bundle, kind, kind) for kind in manifest.kinds}
        self._embed = Session(JointGraph.load(bundle.path(manifest.embed.graph)), ("hidden", *manifest.embed.shared))
        self._packed, taken = self._pack(bundle, allowance) if packed and products == "exact" else ({}, 0)
        self._sizes = KeptSizes(allowance.activations - taken)
        self._fast_kinds = _fast_kinds(bundle) if products == "int8" else {}
        self._embed_weights = bind(weights, {f"w:{name}": name for name in manifest.embed.weights})
        scale = ort.OrtValue.ortvalue_from_numpy(np.asarray(manifest.scale, dtype=np.float32))
        self._scales: OrtValues = {f"scale:{slot.name}": scale for kind in manifest.kinds for slot in kind.slots}
        self._head = _open_head(bundle, weights)
        self._parameters: AdapterParameters | None = None
        self._remembered: RememberedHidden | None = None
        self._lora: list[OrtValues] = []
        self._variants: list[Variant] = []  # a block's own, its activations kept
        self._lowest = 0
        self._size_keys: list[tuple[str, Variant]] = []  # of the blocks from the lowest alive one up
        self._head_alive = False
        self._kept_bytes = 0

    def _pack(self, bundle: Bundle, allowance: Allowance) -> tuple[dict[int, BlockForms], int]:
        """Sessions of their own for as many blocks from the top as half the budget holds, and what they will take."""
        sizes = [self._frozen.block_bytes(index) for index in range(len(self._manifest.blocks))]
        first = packed_from(allowance.activations // 2, sizes)
        found = {}
        for index in range(first, len(sizes)):
            weights = self._frozen.packed(index, bundle.folder)
            if weights is None:
                raise EngineInputError(f"packed weights: a bundle of base {self._manifest.base} has none, only fp32")
            found[index] = self._kinds[self._manifest.blocks[index].kind].packed(weights)
        return found, COPIES * sum(sizes[first:])

    def use(self, parameters: AdapterParameters, remembered: RememberedHidden | None = None) -> None:
        """Take this adapter and alive set; the factors are read in place at every step.

        Args:
            parameters: What is trained, and the rest of the adapter.
            remembered: For :meth:`gradients`, until the next call closes it. Given again with the same parameters, of
                which some have been frozen, it stays open.

        Raises:
            EngineInputError: an adapter tensor is missing, or an alive name is none of the bundle's.
        """
        tensors, alive = parameters.tensors, set(parameters.alive)
        head = {f"{self._manifest.head.module}.{param.name}" for param in self._manifest.head.params}
        lora_names = {f"{name}.{factor}" for name in self._manifest.module_names for factor in ("lora_a", "lora_b")}
        absent = sorted((lora_names | head) - set(tensors))
        if absent:
            raise EngineInputError(f"adapter: no tensor {absent[0]} ({len(absent)} missing)")
        lora: list[OrtValues] = [{} for _ in self._manifest.blocks]
        alive_slots: list[set[tuple[str, str]]] = [set() for _ in self._manifest.blocks]
        for module in self._manifest.modules:
            for factor in ("A", "B"):
                name = f"{module.name}.lora_{factor.lower()}"
                key = f"lora_{factor.lower()}:{module.slot}"
                lora[module.block][key] = ort.OrtValue.ortvalue_from_numpy(tensors[name])
                if name in alive:
                    alive.remove(name)
                    alive_slots[module.block].add((module.slot, factor))
        if alive - head or (alive and alive != head):
            raise EngineInputError(
                f"adapter: alive tensors are not of this bundle: {sorted(alive - head or alive)[:3]}"
            )
        self._head_alive = bool(alive)
        self._head.use(tensors)
        self._lora = lora
        lowest_before = self._lowest
        self._lowest = next((i for i, slots in enumerate(alive_slots) if slots), len(alive_slots))
        self._variants = [
            Variant(frozenset(slots), input_gradient=index > self._lowest, keep=True)
            for index, slots in enumerate(alive_slots)
        ]
        kinds = (block.kind for block in self._manifest.blocks)
        self._size_keys = list(zip(kinds, self._variants, strict=True))[self._lowest :]
        self._take_memory(parameters, remembered, risen=self._lowest != lowest_before)

    def _take_memory(self, parameters: AdapterParameters, remembered: RememberedHidden | None, *, risen: bool) -> None:
        """Go on with the memory of the same training, or take another; ``risen``: the lowest alive block has."""
        again = remembered is not None and self._remembered is remembered and self._parameters is parameters
        if self._remembered is not None and not again:
            self._remembered.close()  # even when it is given again: it is another adapter's
        self._parameters, self._remembered = parameters, remembered
        if remembered is None or not self._lowest:
            return
        if not again:
            remembered.stand_on(self._lowest, self._ground)
        elif risen:
            remembered.rise(self._lowest, self._ground)

    def _ground(self, level: int) -> bytes:
        """A digest of all that the lowest ``level`` blocks compute with, 32 bytes."""
        assert self._parameters is not None, "asked in use() alone"
        digest = hashlib.sha256(f"{self._digest} {level} {bool(self._fast_kinds)}".encode())
        for module in self._manifest.modules:
            for factor in ("lora_a", "lora_b") if module.block < level else ():
                values = self._parameters.tensors[f"{module.name}.{factor}"]
                digest.update(str(values.shape).encode() + values.tobytes())
        return digest.digest()

    @property
    def lowest_alive(self) -> int:
        """Number of the lowest block with an alive factor; the number of blocks when there is none."""
        return self._lowest

    @property
    def kept_bytes(self) -> int:
        """Bytes that the last training step held between its forward and its backward pass; 0 before the first.

        The trained blocks' inputs, the last block's output, and activations where they are kept.
        """
        return self._kept_bytes

    def gradients(self, batch: TokenBatch) -> Gradients:
        """Loss and the gradient of the mean loss for every alive tensor.

        Raises:
            EngineInputError: no adapter is in use, or nothing in it is alive.
        """
        if not (self._head_alive or self._size_keys):
            raise EngineInputError("adapter: nothing is alive, so there is nothing to train")
        hidden, shared, tape = self._forward(batch, taped=True)
        self._kept_bytes = _tape_bytes(tape)
        last = hidden.numpy()
        score, d_rows, found = self._head.gradients(
            select_rows(last, batch),
            batch.labels,
            rows_wanted=bool(tape),
            params_wanted=self._head_alive,
        )
        if not tape:
            return Gradients(score, found)
        importance = example_importance(d_rows, batch)
        found.update(self._backward(scatter_rows(d_rows, batch, last.shape), shared, tape))
        return Gradients(score, found, importance)

    def evaluate(self, batch: TokenBatch) -> Score:
        """Loss and correct predictions; nothing is kept."""
        hidden, _, _ = self._forward(batch, taped=False)
        return self._head.score(select_rows(hidden.numpy(), batch), batch.labels)

    def logits(self, batch: TokenBatch) -> Array:
        """Logits of the batch's rows, shape (n, classes)."""
        hidden, _, _ = self._forward(batch, taped=False)
        return self._head.logits(select_rows(hidden.numpy(), batch))

    def features(self, batch: TokenBatch) -> Array:
        """What enters a classifier's trained layer for the batch's rows, shape (n, features); products are exact.

        Raises:
            EngineInputError: no adapter is in use, or the head is no classifier's linear layer.
        """
        if not isinstance(self._head, ClassHead):
            raise EngineInputError("head: a language model has no classifier whose input could be asked for")
        hidden, _, _ = self._forward(batch, taped=False)
        return self._head.features(select_rows(hidden.numpy(), batch))

    def _forward(self, batch: TokenBatch, *, taped: bool) -> tuple[ort.OrtValue, OrtValues, Tape]:
        """Returns the last hidden state, the shared tensors, and the tape."""
        if self._parameters is None:
            raise EngineInputError("adapter: none in use")
        hidden, made = self._embedded(batch.input_ids, batch.attention_mask)
        frozen = self._lowest if taped else len(self._variants)
        if taped and frozen and self._remembered is not None:
            hidden = self._recalled(self._remembered, batch, hidden, made)
        else:
            hidden = self._through(range(frozen), hidden, made, taped=taped)
        hidden, tape = self._recorded(hidden, made) if taped else (hidden, [])
        return hidden, made, tape

    def _recorded(self, hidden: ort.OrtValue, shared: OrtValues) -> tuple[ort.OrtValue, Tape]:
        """What the blocks from the lowest alive one up make of its input, and the tape."""
        tape: Tape = []
        shape = _shape(hidden)
        first = self._first_kept(shape)
        for index in range(self._lowest, len(self._variants)):
            given = {"hidden": hidden}
            block, inputs = self._trained(index, hidden)
            variant = self._variants[index]
            forward = block.forward_keeping(variant) if index >= first else block.forward()
            kept = forward.run(given, shared, *inputs)
            if index >= first and self._sizes.learn(self._size_keys[index - self._lowest], shape, _bytes(kept)):
                first = self._first_kept(shape)  # which may leave out this very block
            if index < first:
                variant, kept = replace(variant, keep=False), {"out": kept["out"]}
            hidden = kept["out"]
            tape.append((index, variant, {**kept, **given}))
            self._frozen.used(index)
        return hidden, tape

    def _first_kept(self, shape: tuple[int, int]) -> int:
        """Number of the lowest block that keeps its activations for a batch of (examples, tokens)."""
        return self._lowest + self._sizes.first_kept(self._size_keys, shape)

    def _embedded(self, input_ids: Array, attention_mask: Array) -> tuple[ort.OrtValue, OrtValues]:
        """The first hidden state (b, s, width) and the shared tensors."""
        ids = {"input_ids": input_ids, "attention_mask": attention_mask}
        given = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in ids.items()}
        made = self._embed.run(given, self._embed_weights)
        return made.pop("hidden"), made

    def _through(self, blocks: range, hidden: ort.OrtValue, shared: OrtValues, *, taped: bool) -> ort.OrtValue:
        """What some blocks make of a hidden state; nothing is kept."""
        for index in blocks:
            block, inputs = self._trained(index, hidden) if taped else self._exact(index, hidden)
            hidden = block.forward().run({"hidden": hidden}, shared, *inputs)["out"]
            self._frozen.used(index)
        return hidden

    def _recalled(
        self, remembered: RememberedHidden, batch: TokenBatch, hidden: ort.OrtValue, shared: OrtValues
    ) -> ort.OrtValue:
        """What enters the lowest alive block, or the head when no block is alive."""
        frozen = self._lowest
        wanted = batch.attention_mask == 1
        if frozen == len(self._variants):  # the head reads these rows and no others
            wanted = np.zeros(wanted.shape, dtype=np.bool_)
            wanted.reshape(-1)[batch.rows] = True

        def compute(missing: Flags, start: Start | None) -> Array:
            entering, made = hidden, shared
            if not missing.all():
                entering, made = self._embedded(batch.input_ids[missing], batch.attention_mask[missing])
            if start is not None:
                entering = ort.OrtValue.ortvalue_from_numpy(start.hidden)
            blocks = range(start.level if start else 0, frozen)
            out: Array = self._through(blocks, entering, made, taped=True).numpy()
            return out

        return ort.OrtValue.ortvalue_from_numpy(remembered.recall(_keys(batch, wanted), wanted, compute))

    def _backward(self, d_hidden: Array, shared: OrtValues, tape: Tape) -> dict[str, Array]:
        found: dict[str, Array] = {}
        d_out = ort.OrtValue.ortvalue_from_numpy(d_hidden)
        while tape:
            # Popping drops a block's activations as soon as its gradients exist.
            index, variant, kept = tape.pop()
            block, inputs = self._trained(index, d_out)
            made = block.backward(variant).run(kept, {"d_out": d_out}, shared, *inputs)
            self._frozen.used(index)
            prefix = self._manifest.blocks[index].prefix
            for slot, factor in variant.alive:
                factor_name = f"lora_{factor.lower()}"
                found[f"{prefix}.{slot}.{factor_name}"] = made[f"d_{factor_name}:{slot}"].numpy()
            if variant.input_gradient:
                d_out = made["d_hidden"]
        return found

    def _exact(self, index: int, hidden: ort.OrtValue) -> tuple[BlockVariants, tuple[OrtValues, ...]]:
        """A block's sessions for a hidden state of this length, and what they read beside activations."""
        forms = self._packed.get(index) or self._kinds[self._manifest.blocks[index].kind]
        return forms.of(hidden), (self._lora[index], self._frozen.exact(index), self._scales)

    def _trained(self, index: int, hidden: ort.OrtValue) -> tuple[BlockVariants, tuple[OrtValues, ...]]:
        """The same for a training step."""
        if not self._fast_kinds:
            return self._exact(index, hidden)
        forms = self._fast_kinds[self._manifest.blocks[index].kind]
        return forms.of(hidden), (self._lora[index], self._frozen.int8(index), self._scales)


def _keys(batch: TokenBatch, wanted: Flags) -> list[bytes]:
    """Digests of each example's tokens, and of which of their states are wanted."""
    keys = []
    for ids, mask, flags in zip(batch.input_ids, batch.attention_mask, wanted, strict=True):
        digest = hashlib.blake2b(ids[mask == 1].tobytes(), digest_size=KEY_BYTES)
        digest.update(np.flatnonzero(flags).tobytes())
        keys.append(digest.digest())
    return keys


def _shape(hidden: ort.OrtValue) -> tuple[int, int]:
    examples, tokens, _ = hidden.shape()
    return examples, tokens


def _bytes(values: OrtValues) -> int:
    return sum(value.tensor_size_in_bytes() for value in values.values())


def _tape_bytes(tape: Tape) -> int:
    """A block's output is the next one's input, and counts once."""
    held = {id(value): value.tensor_size_in_bytes() for _, _, kept in tape for value in kept.values()}
    return sum(held.values())


def _fast_kinds(bundle: Bundle) -> dict[str, BlockForms]:
    found = {}
    for kind in bundle.manifest.kinds:
        if kind.fast is None:
            raise EngineInputError(f"int8 products: a bundle of base {bundle.manifest.base} has none: export it again")
        found[kind.name] = BlockForms.load(bundle, kind, kind.fast)
    return found


def _open_head(bundle: Bundle, weights: Mapping[str, Array]) -> ClassHead | VocabularyHead:
    head = bundle.manifest.head
    graph = JointGraph.load(bundle.path(head.graph))
    bound = bind(weights, {f"w:{name}": name for name in head.weights})
    if head.vocabulary is None:
        return ClassHead(head, graph, bound, classes=len(bundle.manifest.labels))
    chunk = JointGraph.load(bundle.path(head.vocabulary.graph))
    return VocabularyHead(head, graph, chunk, bound, {name: weights[name] for name in head.vocabulary.weights})
