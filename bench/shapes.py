"""The models by shape, and the cases measured on them. Weights are random: time and memory do not depend on values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

RANK = 8  # of every module
HEAD_CHUNK = 2_048  # rows of the output projection that the head works on at a time

# The linear layers of a block in its order, by path inside it.
QUERY, KEY, VALUE, MIXED = (f"self_attn.{letter}_proj" for letter in "qkvo")
GATE, UP, DOWN = (f"mlp.{word}_proj" for word in ("gate", "up", "down"))
SLOTS = (QUERY, KEY, VALUE, MIXED, GATE, UP, DOWN)


@dataclass(frozen=True)
class Shape:
    """A decoder with a tied output projection.

    Attributes:
        family: As transformers names it in ``model_type``; qwen2 has biases on query, key and value.
        layers: Blocks.
        width: Of the hidden state.
        inner: Of the MLP.
        heads: Query heads.
        groups: Key and value heads.
        vocabulary: Rows of the embedding and of the output projection.
    """

    family: str
    layers: int
    width: int
    inner: int
    heads: int
    groups: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.width // self.heads

    def features(self, slot: str) -> tuple[int, int]:
        """(in, out) features of a linear layer."""
        shared = self.groups * self.head_dim
        return {
            QUERY: (self.width, self.width),
            KEY: (self.width, shared),
            VALUE: (self.width, shared),
            MIXED: (self.width, self.width),
            GATE: (self.width, self.inner),
            UP: (self.width, self.inner),
            DOWN: (self.inner, self.width),
        }[slot]

    @property
    def modules(self) -> tuple[str, ...]:
        """Full names of the LoRA modules from the bottom up, as bundles and peft name them."""
        return tuple(module_name(block, slot) for block in range(self.layers) for slot in SLOTS)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every weight, as transformers names them."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.width)
        for block in range(self.layers):
            for slot in SLOTS:
                inside, outside = self.features(slot)
                yield f"{module_name(block, slot)}.weight", (outside, inside)
                if self.family == "qwen2" and slot in (QUERY, KEY, VALUE):
                    yield f"{module_name(block, slot)}.bias", (outside,)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{block}.{norm}.weight", (self.width,)
        yield "model.norm.weight", (self.width,)


def module_name(block: int, slot: str) -> str:
    """Full name of a block's linear layer."""
    return f"model.layers.{block}.{slot}"


MODELS = {
    "tiny": Shape("llama", 3, 64, 96, 4, 2, 512),
    "llama-6": Shape("llama", 6, 576, 1_536, 9, 3, 8_192),
    "smollm2-135m": Shape("llama", 30, 576, 1_536, 9, 3, 49_152),
    "qwen2.5-0.5b": Shape("qwen2", 24, 896, 4_864, 14, 2, 151_936),
    "llama-1b": Shape("llama", 16, 2_048, 8_192, 32, 8, 128_256),
}


@dataclass(frozen=True)
class Case:
    """One batch of one model.

    Attributes:
        model: A key of :data:`MODELS`.
        batch: Examples.
        tokens: In each of them.
        together: Whether systems take turns, so that they are compared under the same disturbance. The others run one
            after the other, because their processes do not fit into memory side by side.
    """

    model: str
    batch: int
    tokens: int
    together: bool = False


CASES = {
    "tiny": Case("tiny", 2, 16, together=True),  # to try the command out; its figures say nothing
    "2x64": Case("llama-6", 2, 64, together=True),
    "1x512": Case("llama-6", 1, 512, together=True),
    "smollm2-2x64": Case("smollm2-135m", 2, 64),
    "smollm2-1x256": Case("smollm2-135m", 1, 256),
    "0.5b-1x256": Case("qwen2.5-0.5b", 1, 256),
    "1b-1x256": Case("llama-1b", 1, 256),
}
DEFAULT_CASES = ("2x64", "1x512")
