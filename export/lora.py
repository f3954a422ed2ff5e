"""LoRA inside a traced block: a linear layer whose factors and scale are inputs, and the search for such layers.

After Hu et al., "LoRA" (arXiv 2106.09685): y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edge_runtime.bundle import Slot
from export.errors import TargetError
from export.options import ALL_LINEAR
from export.tracing import example_rank

LORA_A, LORA_B, SCALE = "lora_a", "lora_b", "scale"


class LoraLinear(nn.Module):
    """A linear layer with a LoRA pair; every tensor is meant to be replaced by ``functional_call``."""

    def __init__(self, linear: Any, rank: int) -> None:
        super().__init__()
        self.weight = linear.weight  # (out, in)
        self.bias = linear.bias
        self.lora_a = nn.Parameter(torch.randn(rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.randn(linear.out_features, rank))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Any) -> Any:
        """(…, in) to (…, out); the scale is applied where the tensor is thinnest."""
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b)


def find_slots(block: Any, targets: Sequence[str]) -> tuple[Slot, ...]:
    """The linear layers of a block that ``targets`` name, in the order of the block.

    A target names a layer when it is its path inside the block or ends it, as in peft; ``all-linear`` names all.
    """
    return tuple(
        Slot(name=name, in_features=module.in_features, out_features=module.out_features)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and any(names(target, name) for target in targets)
    )


def names(target: str, path: str) -> bool:
    """Whether a target names the layer at ``path``."""
    return target == ALL_LINEAR or path == target or path.endswith(f".{target}")


def check_targets(blocks: Sequence[Any], targets: Sequence[str]) -> None:
    """Demand that every target names a linear layer of some block.

    Raises:
        TargetError: naming the targets that do not, and the layers there are.
    """
    linear = {name for block in blocks for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    unknown = [target for target in targets if not any(names(target, name) for name in linear)]
    if not targets or unknown:
        known = ", ".join(sorted(linear)) or "none"
        raise TargetError(
            f"targets {','.join(unknown) or '(none given)'}: no such linear layer in the blocks, which have: {known}"
        )


def with_lora(block: Any, slots: Sequence[Slot]) -> Any:
    """A copy of the block with its slots replaced by :class:`LoraLinear`, each with its own example rank."""
    block = copy.deepcopy(block)
    for number, slot in enumerate(slots):
        parent, _, child = slot.name.rpartition(".")
        linear = block.get_submodule(slot.name)
        setattr(block.get_submodule(parent), child, LoraLinear(linear, example_rank(number)))
    return block


def peft_targets(model: Any, modules: Sequence[str]) -> tuple[str, ...]:
    """The shortest suffixes by which peft finds exactly ``modules`` in the whole model.

    "dense" alone would also name BERT's pooler, so it becomes "intermediate.dense" and "output.dense".
    """
    wanted = set(modules)
    every = [name for name, _ in model.named_modules()]
    found: dict[str, None] = {}
    for module in modules:
        parts = module.split(".")
        for length in range(1, len(parts) + 1):
            suffix = ".".join(parts[-length:])
            if all(name in wanted for name in every if names(suffix, name)):
                found[suffix] = None
                break
    return tuple(found)
