"""PyTorch models with LoRA of which some factors are trained, to count what that computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_factors(base: Any, factors: Mapping[str, str], *, slots: set[str], task_type: str) -> Any:
    """A transformers model with LoRA of rank 4 by peft.

    Args:
        base: The model.
        factors: What is trained of each module, by its name: "", "A", "B" or "AB".
        slots: Ends of the names of all modules.
        task_type: peft's.
    """
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(r=4, target_modules=sorted(slots), task_type=task_type))
    for name, parameter in model.named_parameters():
        module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        parameter.requires_grad = bool(rest) and rest[0] in factors.get(module, "")
    return model
