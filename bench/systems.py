"""The systems that are compared, the settings each has, and what a contestant's process is told. Light to import."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

import msgspec

System = Literal[
    "emberlora-fp32",
    "emberlora-int8",
    "emberlora-int4",
    "torch-eager",
    "torch-compile",
    "torch-bf16",
    "ort-training",
    "gemm-floor",
]
SYSTEM_NAMES: tuple[System, ...] = get_args(System)
REFERENCE: System = "torch-eager"  # whose gradients the others are compared with
FLOOR: System = "gemm-floor"


Activations = Literal["keep", "recompute", "tight"]
Weights = Literal["mapped", "packed"]
Products = Literal["exact", "fast"]
Lower = Literal["computed", "remembered"]


class Setting(msgspec.Struct, frozen=True):
    """How a system works.

    Attributes:
        activations: Kept for the backward pass, or recomputed from each block's input. "tight" recomputes too, and
            gives weights and temporaries back to the system after each use: the least memory.
        weights: Mapped from the file and read as they lie, or packed for the products in private memory.
        products: Of frozen weights: in float32, or "fast" in int8 for the forward pass and the input gradient.
        lower: What the blocks below the lowest alive one make of an example is computed at every step, or remembered on
            disk and read back.
    """

    activations: Activations = "keep"
    weights: Weights = "mapped"
    products: Products = "exact"
    lower: Lower = "computed"

    def __str__(self) -> str:
        special = [word for word in (self.products, self.lower) if word not in ("exact", "computed")]
        return ", ".join([self.activations, self.weights, *special])

    @property
    def needed(self) -> Setting:
        """The setting whose bare products are those that this one cannot do without."""
        activations: Activations = "recompute" if self.activations == "tight" else self.activations
        return Setting(activations, self.weights, lower=self.lower)

    @property
    def computed(self) -> Setting:
        """The same with nothing remembered."""
        return msgspec.structs.replace(self, lower="computed")


_KINDS: dict[str, tuple[str, ...]] = {
    "activations": get_args(Activations),
    "weights": get_args(Weights),
    "products": get_args(Products),
    "lower": get_args(Lower),
}
WORDS: tuple[str, ...] = tuple(word for words in _KINDS.values() for word in words)


def parse_setting(text: str) -> Setting:
    """Read what :func:`label` wrote; words that are missing stand for the default.

    Raises:
        ValueError: a word is none of :data:`WORDS`.
    """
    fields = {}
    for word in text.split(", "):
        kind = next((kind for kind, words in _KINDS.items() if word in words), None)
        if kind is None:
            raise ValueError(f"setting: expected words of {', '.join(WORDS)}, got {word!r}")
        fields[kind] = word
    return msgspec.convert(fields, Setting)


def _remembered(*settings: Setting) -> tuple[Setting, ...]:
    return tuple(msgspec.structs.replace(setting, lower="remembered") for setting in settings)


_MAPPED = (Setting(), Setting("recompute"), Setting("tight"))
_LOW_BIT = (*_MAPPED, *_remembered(_MAPPED[0]))
_FAST = tuple(msgspec.structs.replace(setting, products="fast") for setting in _LOW_BIT)
# A budget packs weights from what it has left for activations, so packed weights without kept activations do not occur.
_PACKED = Setting("keep", "packed")
_ONLY_KEEP = (Setting(),)

# What a user can choose in each system.
SETTINGS: dict[System, tuple[Setting, ...]] = {
    "emberlora-fp32": (*_MAPPED, _PACKED, *_remembered(*_MAPPED[:2])),
    "emberlora-int8": (*_LOW_BIT, *_FAST),
    "emberlora-int4": _LOW_BIT,
    "torch-eager": _ONLY_KEEP,
    "torch-compile": _ONLY_KEEP,
    "torch-bf16": _ONLY_KEEP,
    "ort-training": _ONLY_KEEP,
    "gemm-floor": (*_MAPPED[:2], _PACKED, *_remembered(*_MAPPED[:2])),
}

# Ways to run a peer among which the best is taken; the first is what a quick run uses.
VARIANTS: dict[System, tuple[str, ...]] = {
    "torch-compile": ("default", "max-autotune-no-cudagraphs"),
    "torch-bf16": ("fp32 weights", "bf16 weights", "bf16 weights, compiled"),
}


def label(system: System, setting: Setting) -> str:
    """What a line of results says under ``setting``: a peer has no choice of weights."""
    return str(setting) if system.startswith("emberlora") or system == FLOOR else setting.activations


def counted_threads(count: int) -> str:
    """The number in words: "1 thread", "2 threads"."""
    return "1 thread" if count == 1 else f"{count} threads"


def chosen_settings(system: System, words: Collection[str], *, quick: bool) -> tuple[Setting, ...]:
    """The settings to measure.

    Args:
        system: Whose.
        words: Only settings with all of these words, for a system that has a choice; none means all of them.
        quick: Leave out the tight settings, and recomputation in the low-bit systems and of what is remembered.
    """
    offered = SETTINGS[system]
    if len(offered) == 1:
        return offered
    if words:
        return tuple(setting for setting in offered if set(words) <= set(msgspec.structs.astuple(setting)))
    if not quick:
        return offered
    full = system in ("emberlora-fp32", FLOOR)
    return tuple(s for s in offered if s.activations == "keep" or (full and s == Setting("recompute")))


class Setup(msgspec.Struct, frozen=True):
    """What a contestant is given; paths are absolute.

    Attributes:
        system: Which it is.
        setting: How it works.
        variant: Of :data:`VARIANTS`, "" for a system with one way.
        shape: Key of :data:`bench.shapes.MODELS`.
        model: The Hugging Face folder.
        bundle: The bundle's folder, "" for a system without one.
        adapter: The peft folder.
        batch: Examples.
        tokens: In each.
        factors: Alive factors of every module by name.
        threads: Of the one thread pool.
        amx: False keeps the process from using the processor's AMX tiles.
        gradients: Where to write the first step's gradients, an .npz file.
        python: Interpreter of the system's own environment, "" for this one.
    """

    system: System
    setting: Setting
    variant: str
    shape: str
    model: str
    bundle: str
    adapter: str
    batch: int
    tokens: int
    factors: dict[str, str]
    threads: int
    amx: bool
    gradients: str
    python: str = ""
