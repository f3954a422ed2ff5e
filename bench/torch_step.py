"""PyTorch as a contestant: transformers and peft with SDPA attention; eager, compiled, or under bf16 autocast.

It gets what helps it: no key/value cache, the fused optimizer, dead factors without gradient, no dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bench.batches import LR, token_ids
from bench.systems import Setup


def torch_peft(setup: Setup) -> Any:
    """The step of one of the torch systems; see :data:`bench.contestant.Made`."""
    torch.set_num_threads(setup.threads)
    half = setup.system == "torch-bf16"
    base = AutoModelForCausalLM.from_pretrained(
        setup.model,
        attn_implementation="sdpa",
        local_files_only=True,
        dtype=torch.bfloat16 if setup.variant.startswith("bf16 weights") else torch.float32,
    )
    model = PeftModel.from_pretrained(base, setup.adapter, is_trainable=True).eval()
    trained = _train_only(model, setup.factors)
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0, fused=True)
    ids = torch.tensor(token_ids(setup))

    def loss() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    run = _compiled(loss, setup)

    def step() -> None:
        run().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    run().backward()
    first = {name: parameter.grad.float().numpy().copy() for name, parameter in trained.items()}
    optimizer.zero_grad(set_to_none=True)
    return step, first


def _compiled(loss: Any, setup: Setup) -> Any:
    if setup.system == "torch-compile":
        mode = None if setup.variant in ("", "default") else setup.variant
        return torch.compile(loss, mode=mode, dynamic=False)
    if setup.variant.endswith("compiled"):
        return torch.compile(loss, dynamic=False)
    return loss


def _train_only(model: Any, factors: dict[str, str]) -> dict[str, Any]:
    """Turn the gradient of every dead factor off; the alive parameters by adapter name."""
    trained = {}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module, _, leaf = key.removeprefix("base_model.model.").partition(".lora_")
        factor = leaf[0]  # "A.default.weight" or "B.default.weight"
        parameter.requires_grad_(factor in factors[module])
        if parameter.requires_grad:
            trained[f"{module}.lora_{factor.lower()}"] = parameter
    return trained
