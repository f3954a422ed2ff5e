"""How much a device computes for a plan: the matrix products of its training steps, in floating-point operations.

Counted as the block engine works: forward through all blocks, backward down to the lowest alive block, in it only what
its alive factors need. A multiplication and an addition count as two. Tokens are real ones, without padding. Of a
decoder the output projection counts too, on the tokens that are trained: forward, and for the gradient of what enters
it. Its causal mask saves nothing on texts of fewer than 256 tokens, in the engine as in PyTorch, so none of it is left
out here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from edge_runtime.bundle import Manifest, Module
from edge_runtime.data import Example
from edge_runtime.wire import ModulePlan


@dataclass(frozen=True)
class Slots:
    """Linear layers of a block by what reads their output.

    Attributes:
        attended: Query, key and value: attention.
        mixed: The layer after it: the residual stream.
        inner: The MLP's first layers: its activation.
        outer: The MLP's last layer: the residual stream.
    """

    attended: tuple[str, str, str]
    mixed: str
    inner: tuple[str, ...]
    outer: str


BERT = Slots(
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    ("intermediate.dense",),
    "output.dense",
)
LLAMA = Slots(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
)
_NOTHING: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True)
class Texts:
    """Sizes of a device's examples.

    Attributes:
        tokens: How many they have together.
        squares: The sum over examples of the square of that.
        rows: Positions that the head sees.
    """

    tokens: int
    squares: int
    rows: int

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Texts:
        """From tokenised examples."""
        sizes = [(len(example.ids), example.weight) for example in examples]
        return cls(sum(n for n, _ in sizes), sum(n * n for n, _ in sizes), sum(rows for _, rows in sizes))

    def part(self, tokens: int) -> Texts:
        """Examples of the usual sizes that have so many tokens together."""
        share = tokens / self.tokens
        return Texts(tokens, round(self.squares * share), round(self.rows * share))


def training_flop(
    manifest: Manifest, plans: Sequence[ModulePlan], texts: Texts, spared: Mapping[int, int] = _NOTHING
) -> int:
    """Operations of one pass over the texts, all blocks together.

    Args:
        manifest: Of a BERT-like classifier, or of a decoder built as Llama is.
        plans: The round's modules.
        texts: What is trained on.
        spared: Tokens for which the lowest blocks were read and not computed, by how many blocks these were. They are
            taken to be from texts of the usual lengths.
    """
    alive = {plan.name: plan.alive for plan in plans}
    ranks = {plan.name: plan.rank for plan in plans}
    lowest = min((module.block for module in manifest.modules if alive[module.name]), default=len(manifest.blocks))
    total = 0
    for block in range(len(manifest.blocks)):
        modules = [module for module in manifest.modules if module.block == block]
        read = sum(tokens for level, tokens in spared.items() if level > block)
        total += round(forward_flop(modules, ranks, texts) * (1 - read / texts.tokens))
        if block >= lowest:
            total += _backward(modules, alive, ranks, texts, below=block > lowest)
    return total + _vocabulary(manifest, texts) * (1 + (lowest < len(manifest.blocks)))


def full_flop(manifest: Manifest, texts: Texts) -> int:
    """The same of a classifier all of which is trained: weights and inputs of layers get gradients, without LoRA."""
    total = 0
    for block in range(len(manifest.blocks)):
        modules = [module for module in manifest.modules if module.block == block]
        layers = sum(2 * module.in_features * module.out_features for module in modules)
        total += 3 * texts.tokens * layers + 6 * _attention_product(modules, texts)
    return total


def forward_flop(modules: Sequence[Module], ranks: Mapping[str, int], texts: Texts) -> int:
    """Of one block: its layers with their LoRA, and attention."""
    layers = sum(_layer(module, ranks) for module in modules)
    return texts.tokens * layers + 2 * _attention_product(modules, texts)


def _layer(module: Module, ranks: Mapping[str, int]) -> int:
    """Of one token through one layer and its LoRA."""
    features = module.in_features, module.out_features
    return 2 * (features[0] * features[1] + ranks[module.name] * sum(features))


def _vocabulary(manifest: Manifest, texts: Texts) -> int:
    """Of a decoder's output projection: the logits, or the gradient of what enters. Classifiers' heads are left out."""
    return 2 * texts.rows * manifest.width * manifest.text.vocab_size if manifest.head.vocabulary else 0


def _slots(modules: Sequence[Module]) -> Slots:
    """Of a block whose every linear layer is a module."""
    names = {module.slot for module in modules}
    return next(slots for slots in (BERT, LLAMA) if names == {*slots.attended, slots.mixed, *slots.inner, slots.outer})


def _attention_product(modules: Sequence[Module], texts: Texts) -> int:
    """Of Q·Kᵀ, or of P·V: each is as large, whatever the number of heads; those of keys and values are shared."""
    query = _slots(modules).attended[0]
    width = next(module.out_features for module in modules if module.slot == query)
    return 2 * texts.squares * width


def _backward(
    modules: Sequence[Module], alive: Mapping[str, str], ranks: Mapping[str, int], texts: Texts, *, below: bool
) -> int:
    slots = _slots(modules)
    living = {module.slot: bool(alive[module.name]) for module in modules}
    into = _input_gradients(slots, living, below)
    per_token = 0
    for module in modules:
        inside, outside, rank = module.in_features, module.out_features, ranks[module.name]
        factors, wanted = alive[module.name], into[module.slot]
        per_token += 2 * inside * outside * wanted  # dx = dy W
        per_token += 2 * outside * rank * ("B" in factors)  # dB = dyᵀ h
        per_token += 2 * outside * rank * (wanted or "A" in factors)  # dh = dy B
        per_token += 2 * inside * rank * ("A" in factors)  # dA = dhᵀ x
        per_token += 2 * inside * rank * wanted  # dx += dh A
    query, key, value = (below or living[slot] for slot in slots.attended)
    products = value + (query or key) + query + key  # dV, dP, dQ, dK
    return texts.tokens * per_token + products * _attention_product(modules, texts)


def _input_gradients(slots: Slots, living: Mapping[str, bool], below: bool) -> dict[str, bool]:
    """Whether the gradient of each layer's input is wanted; ``below``: whether that of the block's input is."""
    attended = below or any(living[slot] for slot in slots.attended)
    middle = attended or living[slots.mixed]
    outer = middle or any(living[slot] for slot in slots.inner)
    return {
        **dict.fromkeys(slots.attended, below),
        slots.mixed: attended,
        **dict.fromkeys(slots.inner, middle),
        slots.outer: outer,
    }
