"""How much a device computes for a plan: the matrix products of its training steps, in floating-point operations.

Counted as the block engine works: forward through all blocks, backward down to the lowest alive block, in it only what
its alive factors need. A multiplication and an addition count as two. Tokens are real ones, without padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from edge_runtime.bundle import Manifest, Module
from edge_runtime.wire import ModulePlan

# Slots of a BERT block by what reads their output: attention, the MLP's inner layer, the residual stream.
_ATTENDED = ("attention.self.query", "attention.self.key", "attention.self.value")
_MIXED, _INNER, _OUTER = "attention.output.dense", "intermediate.dense", "output.dense"
_NOTHING: Mapping[int, int] = MappingProxyType({})


@dataclass(frozen=True)
class Texts:
    """Sizes of a device's examples: how many tokens they have together, and the sum of their squares."""

    tokens: int
    squares: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Texts:
        """From the examples' lengths in tokens."""
        return cls(sum(lengths), sum(length * length for length in lengths))


def training_flop(
    manifest: Manifest, plans: Sequence[ModulePlan], texts: Texts, spared: Mapping[int, int] = _NOTHING
) -> int:
    """Operations of one pass over the texts, all blocks together.

    Args:
        manifest: Of a BERT-like classifier.
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
    return total


def full_flop(manifest: Manifest, texts: Texts) -> int:
    """The same when every parameter is trained: each layer's weight and input get a gradient, and there is no LoRA."""
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


def _attention_product(modules: Sequence[Module], texts: Texts) -> int:
    """Of Q·Kᵀ, or of P·V: each is as large, whatever the number of heads."""
    width = next(module.out_features for module in modules if module.slot == _ATTENDED[0])
    return 2 * texts.squares * width


def _backward(
    modules: Sequence[Module], alive: Mapping[str, str], ranks: Mapping[str, int], texts: Texts, *, below: bool
) -> int:
    into = _input_gradients({module.slot: alive[module.name] for module in modules}, below)
    per_token = 0
    for module in modules:
        inside, outside, rank = module.in_features, module.out_features, ranks[module.name]
        factors, wanted = alive[module.name], into[module.slot]
        per_token += 2 * inside * outside * wanted  # dx = dy W
        per_token += 2 * outside * rank * ("B" in factors)  # dB = dyᵀ h
        per_token += 2 * outside * rank * (wanted or "A" in factors)  # dh = dy B
        per_token += 2 * inside * rank * ("A" in factors)  # dA = dhᵀ x
        per_token += 2 * inside * rank * wanted  # dx += dh A
    read = [below or bool(alive[module.name]) for slot in _ATTENDED for module in modules if module.slot == slot]
    query, key, value = read
    products = value + (query or key) + query + key  # dV, dP, dQ, dK
    return texts.tokens * per_token + products * _attention_product(modules, texts)


def _input_gradients(alive: Mapping[str, str], below: bool) -> dict[str, bool]:
    """Whether the gradient of each layer's input is wanted; ``below``: whether that of the block's input is."""
    attended = below or any(alive[slot] for slot in _ATTENDED)
    middle = attended or bool(alive[_MIXED])
    outer = middle or bool(alive[_INNER])
    return dict.fromkeys(_ATTENDED, below) | {_MIXED: attended, _INNER: middle, _OUTER: outer}
