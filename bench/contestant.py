"""One system in a process of its own: ``python -m bench.contestant SETUP.json``; step counts on stdin, a line each.

Each answer is one JSON line with the milliseconds of every step, forward, backward and optimizer together. The first
line says what one step's gradients are, so that the systems can be compared before they are timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edge_runtime.training.memory import MemorySampler

System = Literal["emberlora-fp32", "torch-eager", "torch-compile", "torch-bf16"]
_LR = 1e-5  # small: the timing must not depend on where the weights wander


class Setup(msgspec.Struct, frozen=True):
    """What a contestant is given."""

    system: System
    setting: Literal["keep", "recompute"]
    model: str  # Hugging Face folder
    bundle: str
    adapter: str  # peft folder
    batch: int
    tokens: int
    alive_from: int  # lowest block whose factors are trained
    threads: int
    gradients: str  # where to write the first step's gradients, an .npz file


Step = Callable[[], None]


def token_ids(setup: Setup, vocabulary: int) -> np.ndarray:
    """The batch every contestant trains on, shape (batch, tokens), int64."""
    return np.random.default_rng(0).integers(3, vocabulary, size=(setup.batch, setup.tokens))


def emberlora(setup: Setup) -> tuple[Step, dict[str, np.ndarray]]:
    """Our engine with mapped weights."""
    from edge_runtime.bundle import adapter_ranks, open_bundle
    from edge_runtime.data import Batch
    from edge_runtime.engine.adamw import AdamW
    from edge_runtime.engine.parameters import AdapterParameters
    from edge_runtime.training.session import WorkingBundle
    from edge_runtime.wire import ModulePlan, Training

    budget = 0 if setup.setting == "recompute" else None
    work = WorkingBundle(open_bundle(Path(setup.bundle), verify=False), threads=setup.threads, memory_budget_mb=budget)
    manifest = work.bundle.manifest
    adapter = work.adapter(Path(setup.adapter))
    ranks = adapter_ranks(manifest, adapter)
    plan = [ModulePlan(m.name, ranks[m.name], "AB" if m.block >= setup.alive_from else "") for m in manifest.modules]
    parameters = AdapterParameters(adapter, work.layout(plan, head_alive=False))
    ids = token_ids(setup, manifest.text.vocab_size)
    rows = np.arange(ids.size).reshape(ids.shape)[:, :-1].reshape(-1)
    batch = Batch(ids, np.ones_like(ids), rows=rows, labels=ids[:, 1:].reshape(-1), examples=np.arange(setup.batch))
    optimizer = AdamW(parameters, Training(setup.batch, setup.tokens, _LR, _LR, _LR, steps=1))
    work.engine.use(parameters)
    first = {name: np.array(gradient) for name, gradient in work.engine.gradients(batch).tensors.items()}

    def step() -> None:
        optimizer.step(work.engine.gradients(batch).tensors)

    return step, first


def torch_peft(setup: Setup) -> tuple[Step, dict[str, np.ndarray]]:
    """transformers + peft with SDPA attention; eager, compiled, or under bf16 autocast."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setup.threads)
    base = AutoModelForCausalLM.from_pretrained(setup.model, attn_implementation="sdpa", local_files_only=True)
    model = PeftModel.from_pretrained(base, setup.adapter, is_trainable=True).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(int(name.split(".layers.")[1].split(".")[0]) >= setup.alive_from)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=_LR, weight_decay=0.0)
    ids = torch.tensor(token_ids(setup, base.config.vocab_size))

    def loss() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setup.system == "torch-bf16"):
            return model(input_ids=ids, labels=ids).loss

    run = torch.compile(loss) if setup.system == "torch-compile" else loss

    def step() -> None:
        run().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    run().backward()
    first = {_our_name(name): parameter.grad.float().numpy().copy() for name, parameter in trained.items()}
    optimizer.zero_grad(set_to_none=True)
    return step, first


def _our_name(key: str) -> str:
    name = key.removeprefix("base_model.model.")
    return name.replace(".lora_A.default.weight", ".lora_a").replace(".lora_B.default.weight", ".lora_b")


def main(path: str) -> None:
    """Serve until standard input ends."""
    setup = msgspec.json.decode(Path(path).read_bytes(), type=Setup)
    make = emberlora if setup.system == "emberlora-fp32" else torch_peft
    with MemorySampler() as memory:
        step, first = make(setup)
        np.savez(setup.gradients, **first)  # type: ignore[arg-type]  # mypy reads the names as options of savez
        for _ in range(2):
            step()
        _say({"ready": True})
        for line in sys.stdin:
            times = []
            for _ in range(int(line)):
                began = time.perf_counter()
                step()
                times.append(1e3 * (time.perf_counter() - began))
            peak = memory.peak
            _say({"step_ms": times, "peak_private_mb": peak.private_mb, "peak_total_mb": peak.total_mb})


def _say(message: dict[str, object]) -> None:
    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
