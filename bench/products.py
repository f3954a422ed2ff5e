"""The matrix products of one training step: what no implementation of it can leave out.

They follow the block engine. Above the lowest alive block everything flows back; in it, only what its alive factors
need; below it there is no backward pass, and no forward pass either where its output is remembered. Recomputing repeats
the forward products that the backward pass reads. The head runs over the trained rows, forward and back, a chunk of the
vocabulary at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bench.shapes import DOWN, GATE, HEAD_CHUNK, KEY, MIXED, QUERY, RANK, SLOTS, UP, VALUE, Shape, module_name

Role = Literal["frozen", "lora", "attention", "head"]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """left · right, (…, m, k) · (…, k, n), where either operand may lie transposed in memory.

    Attributes:
        role: What it belongs to.
        sizes: (m, k, n).
        copies: How many independent matrices, () for one.
        flip_left: The left operand lies as (k, m).
        flip_right: The right operand lies as (n, k).
        weight: The right operand where it is a tensor of the model, by slot and leaf; "" for an activation.
    """

    role: Role
    sizes: tuple[int, int, int]
    copies: Sizes = ()
    flip_left: bool = False
    flip_right: bool = False
    weight: str = ""

    @property
    def left(self) -> Sizes:
        """Shape of the left operand as it lies."""
        m, k, _ = self.sizes
        return (*self.copies, *((k, m) if self.flip_left else (m, k)))

    @property
    def right(self) -> Sizes:
        """Shape of the right operand as it lies."""
        _, k, n = self.sizes
        return (*self.copies, *((n, k) if self.flip_right else (k, n)))

    @property
    def out(self) -> Sizes:
        """Shape of the result."""
        return (*self.copies, self.sizes[0], self.sizes[2])

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        count = 2
        for size in (*self.copies, *self.sizes):
            count *= size
        return count


Products = tuple[Product, ...]


@dataclass(frozen=True)
class Flow:
    """Which gradients exist in a block: ``into`` a layer's input and ``out_of`` its output, by slot."""

    into: dict[str, bool]
    out_of: dict[str, bool]


def flow(factors: Mapping[str, str], below: bool) -> Flow:
    """What a block's backward pass makes.

    Args:
        factors: Alive factors by slot.
        below: Whether the gradient of the block's input is wanted.
    """
    out = {slot: below or bool(factors[slot]) for slot in (QUERY, KEY, VALUE)}
    mixed = any(out.values())
    out[MIXED] = middle = mixed or bool(factors[MIXED])  # the residual stream between attention and MLP
    out |= {slot: middle or bool(factors[slot]) for slot in (GATE, UP)}
    out[DOWN] = True
    into = dict.fromkeys((QUERY, KEY, VALUE), below) | {MIXED: mixed, GATE: middle, UP: middle}
    return Flow(into | {DOWN: out[GATE] or out[UP]}, out)


@dataclass(frozen=True)
class Block:
    """The products of one block on ``batch`` examples of ``tokens`` tokens."""

    shape: Shape
    batch: int
    tokens: int
    factors: Mapping[str, str]  # alive factors by slot
    below: bool  # whether the gradient of its input is wanted
    flow: Flow = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flow", flow(self.factors, self.below))  # a frozen class's way to derive a field

    def forward(self) -> Products:
        """Everything up to the block's output."""
        return tuple(p for slot in SLOTS for p in self._linear(slot)) + self._attend()

    def repeated(self) -> Products:
        """What recomputing makes again: all but what only the block's output or nothing reads."""
        made: list[Product] = [*self._attend()]
        read = self._values_read()
        for slot in SLOTS:
            if slot in read:
                made += self._linear(slot)
            elif "B" in self.factors[slot]:
                made += self._thin(slot)
        return tuple(made)

    def backward(self) -> Products:
        """The gradients of the alive factors, and of the input where wanted."""
        made: list[Product] = []
        for slot in SLOTS:
            made += self._linear_backward(slot)
        return (*made, *self._attend_backward())

    def _values_read(self) -> set[str]:
        """Layers whose output the backward pass reads; that of ``down`` is the block's own output."""
        read = {QUERY, KEY, VALUE, MIXED}  # attention and the residual stream lie below everything in the MLP
        gated = bool(self.factors[DOWN])
        if gated or self.flow.out_of[GATE] or self.flow.out_of[UP]:
            read.add(GATE)
        if gated or self.flow.out_of[GATE]:
            read.add(UP)
        return read

    def _linear(self, slot: str) -> Products:
        inside, outside = self.shape.features(slot)
        frozen = Product("frozen", (self._rows, inside, outside), flip_right=True, weight=f"{slot}.weight")
        back = Product("lora", (self._rows, RANK, outside), flip_right=True, weight=f"{slot}.lora_b")
        return (frozen, *self._thin(slot), back)

    def _thin(self, slot: str) -> Products:
        """h = x Aᵀ."""
        inside, _ = self.shape.features(slot)
        return (Product("lora", (self._rows, inside, RANK), flip_right=True, weight=f"{slot}.lora_a"),)

    def _linear_backward(self, slot: str) -> Products:
        inside, outside = self.shape.features(slot)
        rows, factors, into = self._rows, self.factors[slot], self.flow.into[slot]
        made = []
        if into:
            made.append(Product("frozen", (rows, outside, inside), weight=f"{slot}.weight"))
        if "B" in factors:  # dB = dyᵀ h
            made.append(Product("lora", (outside, rows, RANK), flip_left=True))
        if into or "A" in factors:  # dh = dy B
            made.append(Product("lora", (rows, outside, RANK), weight=f"{slot}.lora_b"))
        if "A" in factors:  # dA = dhᵀ x
            made.append(Product("lora", (RANK, rows, inside), flip_left=True))
        if into:  # dx = dh A
            made.append(Product("lora", (rows, RANK, inside), weight=f"{slot}.lora_a"))
        return tuple(made)

    def _attend(self) -> Products:
        rows, keys, dim = self._stacked, self.tokens, self.shape.head_dim
        return (
            Product("attention", (rows, dim, keys), self._copies, flip_right=True),  # Q Kᵀ
            Product("attention", (rows, keys, dim), self._copies),  # P V
        )

    def _attend_backward(self) -> Products:
        rows, keys, dim, copies = self._stacked, self.tokens, self.shape.head_dim, self._copies
        wanted = self.flow.out_of
        made = []
        if wanted[VALUE]:  # dV = Pᵀ dO
            made.append(Product("attention", (keys, rows, dim), copies, flip_left=True))
        if wanted[QUERY] or wanted[KEY]:  # dP = dO Vᵀ
            made.append(Product("attention", (rows, dim, keys), copies, flip_right=True))
        if wanted[QUERY]:  # dQ = dS K
            made.append(Product("attention", (rows, keys, dim), copies))
        if wanted[KEY]:  # dK = dSᵀ Q
            made.append(Product("attention", (keys, rows, dim), copies, flip_left=True))
        return tuple(made)

    @property
    def _rows(self) -> int:
        return self.batch * self.tokens

    @property
    def _copies(self) -> Sizes:
        return (self.batch, self.shape.groups)

    @property
    def _stacked(self) -> int:
        """Query heads of a group stand above one another, so that keys and values are not repeated."""
        return self.shape.heads // self.shape.groups * self.tokens


def head_products(shape: Shape, rows: int) -> Products:
    """Logits of ``rows`` rows and the gradient of the rows, chunk by chunk of the vocabulary."""
    made: list[Product] = []
    for start in range(0, shape.vocabulary, HEAD_CHUNK):
        width, chunk = shape.width, min(HEAD_CHUNK, shape.vocabulary - start)
        made.append(Product("head", (rows, width, chunk), flip_right=True, weight=str(start)))
        made.append(Product("head", (rows, chunk, width), weight=str(start)))
    return tuple(made)


@dataclass(frozen=True)
class Stage:
    """Products that run one after the other; ``block`` is None for the head."""

    block: int | None
    products: Products


def step_stages(
    shape: Shape, batch: int, tokens: int, factors: Mapping[str, str], *, recompute: bool, remembered: bool = False
) -> tuple[Stage, ...]:
    """The products of one step in the order of the engine.

    Args:
        shape: The model.
        batch: Examples.
        tokens: In each; all but the last position of each are trained.
        factors: Alive factors by module name.
        recompute: Whether activations are made again in the backward pass.
        remembered: Whether the blocks below the lowest alive one are left out.
    """
    by_block = [{slot: factors[module_name(block, slot)] for slot in SLOTS} for block in range(shape.layers)]
    lowest = next((block for block, slots in enumerate(by_block) if any(slots.values())), shape.layers)
    blocks = [Block(shape, batch, tokens, slots, below=number > lowest) for number, slots in enumerate(by_block)]
    first = lowest if remembered else 0
    stages = [Stage(number, blocks[number].forward()) for number in range(first, shape.layers)]
    stages.append(Stage(None, head_products(shape, batch * (tokens - 1))))
    for number in reversed(range(lowest, shape.layers)):
        again = blocks[number].repeated() if recompute else ()
        stages.append(Stage(number, again + blocks[number].backward()))
    return tuple(stages)
