"""Checks a written bundle against autograd: the Hugging Face model with real peft layers is the oracle.

Every gradient is compared: both factors of every module of every block, and the head. Nothing is shared with the
exporter's own LoRA code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from edge_runtime.bundle import Array, Bundle, Manifest
from export.errors import VerificationError
from export.options import VerifiedCase
from export.quiet import quiet
from export.runner import Batch, Runner

TOLERANCE = 1e-4  # of ‖g − g*‖ / ‖g*‖; float32 on both sides gives about 1e-6 a block
# Some gradients of a deep decoder are more sensitive: one of SmolLM2's is 4.7e-4 off in PyTorch's own float32, 1.6e-4
# here. So a gradient may be as far off as PyTorch's, but never farther than this; what is wrong is near 1.
_ROUNDING_CAP = 1e-2
# Standard deviation of B times the root of the rank: an adapter as training makes it. Five times as much makes a deep
# decoder so sensitive that the rounding of float32 shows in single gradients (4e-4 on SmolLM2 in int4).
_B_SIZE = 0.02
FAST_TOLERANCE = 0.2  # of a block with int8 products: 0.06 to 0.11 with weights of 7 bits; what is wrong is above 0.25
_SHAPES = ((2, 12), (1, 20))  # (batch, seq); the first has a padded example
_FLOOR = 1e-2  # a gradient this small beside the whole is measured against the whole: deep models amplify rounding


@dataclass(frozen=True)
class Case:
    """One comparison: a batch, adapter tensors whose shapes set the ranks, and each module's scale."""

    name: str
    batch: Batch
    adapter: dict[str, Array]
    scales: dict[str, float]


def verify(bundle: Bundle, model: Any, *, seed: int) -> tuple[VerifiedCase, ...]:
    """Compare the bundle on two shapes and two rank assignments, its graphs for long sequences too.

    Args:
        bundle: The bundle on disk.
        model: The model it was made from, eager attention, float32; it comes back without adapters.
        seed: Of the batches and factors.

    Raises:
        VerificationError: a relative error above :data:`TOLERANCE`, or a result that is not finite.
    """
    runners = {"": _runner(bundle)}
    if any(kind.long for kind in bundle.manifest.kinds):
        runners[", long form"] = _runner(bundle, long=True)
    cases = []
    for case in make_cases(bundle.manifest, np.random.default_rng(seed)):
        with quiet():
            loss, expected = autograd(model, bundle.manifest, case)
        rounding: dict[str, float] = {}
        for word, runner in runners.items():
            named = replace(case, name=case.name + word)
            found_loss, found = _run(runner, named)
            errors = relative_errors(found, expected)
            errors["loss"] = abs(found_loss - loss) / abs(loss)
            if max(errors.values()) > TOLERANCE and not rounding:
                rounding = rounding_errors(model, bundle.manifest, case, expected)
            cases.append(verified(named, errors, rounding))
    return tuple(cases)


def verified(case: Case, errors: Mapping[str, float], rounding: Mapping[str, float] | None = None) -> VerifiedCase:
    """The worst of one comparison's relative errors.

    Args:
        case: What was compared.
        errors: By the name of a gradient, or "loss".
        rounding: How far PyTorch's own float32 is off, where that may excuse an error.

    Raises:
        VerificationError: an error is above :data:`TOLERANCE` and above what rounding explains, or not a number.
    """
    for name, error in errors.items():
        allowed = max(TOLERANCE, min((rounding or {}).get(name, 0.0), _ROUNDING_CAP))
        if not error <= allowed:
            raise VerificationError(
                f"verification {case.name}: {name}: relative error: expected at most {allowed:.2g}, got {error:.2e}"
            )
    worst = max(errors, key=lambda name: errors[name])
    return VerifiedCase(case.name, errors[worst], worst)


def verify_fast(bundle: Bundle, *, seed: int) -> float | None:
    """Compare one block of every kind with int8 products with its exact form; None when the bundle has none.

    With weights of 7 bits, so that every processor finds the same. Block by block, because a deep decoder turns
    rounding of any kind into much larger differences of its gradients: whether training bears that is a question
    for training.

    Returns:
        The worst root mean square of ‖x − x*‖ / ‖x*‖ over the outputs of a block.

    Raises:
        VerificationError: it is above :data:`FAST_TOLERANCE`, or a result is not finite.
    """
    manifest = bundle.manifest
    if not any(kind.fast for kind in manifest.kinds):
        return None
    case = next(make_cases(manifest, np.random.default_rng(seed)))
    exact, fast, long = _runner(bundle), _runner(bundle, fast=True), _runner(bundle, fast=True, long=True)
    embedded = exact.embedded(case.batch)
    worst = 0.0
    for kind, runner in itertools.product(manifest.kinds, (fast, long)):
        index = next(index for index, block in enumerate(manifest.blocks) if block.kind == kind.name)
        wanted, found = (side.whole_block(index, embedded, case.adapter, case.scales) for side in (exact, runner))
        errors = [np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name]) for name in wanted]
        error = float(np.sqrt(np.mean(np.square(errors))))
        if not error <= FAST_TOLERANCE:
            raise VerificationError(
                f"verification {kind.name}, int8 products: relative error: "
                f"expected at most {FAST_TOLERANCE:g}, got {error:.2e}"
            )
        worst = max(worst, error)
    return worst


def _runner(bundle: Bundle, **forms: bool) -> Runner:
    try:
        return Runner(bundle, **forms)
    except Exception as error:
        raise VerificationError(f"verification: onnxruntime cannot load a graph: {error!r:.300}") from error


def _run(runner: Runner, case: Case) -> tuple[float, dict[str, Array]]:
    try:
        return runner.gradients(case.batch, case.adapter, case.scales, _grad_scale(case))
    except Exception as error:
        raise VerificationError(f"verification {case.name}: a graph cannot be run: {error!r:.300}") from error


def relative_errors(found: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """‖g − g*‖ / ‖g*‖ of every expected tensor; a missing or extra one counts as infinite."""
    whole = float(np.sqrt(sum(float(np.square(value).sum()) for value in expected.values())))
    errors = {name: float("inf") for name in found.keys() ^ expected.keys()}
    for name in found.keys() & expected.keys():
        scale = max(float(np.linalg.norm(expected[name])), _FLOOR * whole)
        errors[name] = float(np.linalg.norm(found[name] - expected[name])) / scale
    return errors


def make_cases(manifest: Manifest, rng: np.random.Generator) -> Iterator[Case]:
    """Two shapes times two rank assignments: the full rank everywhere, and ranks that differ from module to module."""
    full = [manifest.r_max] * len(manifest.modules)
    mixed = [1 + (5 * index + 2) % manifest.r_max for index in range(len(manifest.modules))]
    for batch, seq in _SHAPES:
        for word, ranks in (("full", full), ("mixed", mixed)):
            yield _case(
                manifest, f"{batch}x{seq} {word} ranks", (batch, min(seq, manifest.text.max_tokens)), ranks, rng
            )


def _case(manifest: Manifest, name: str, shape: tuple[int, int], ranks: list[int], rng: np.random.Generator) -> Case:
    ids = rng.integers(0, manifest.text.vocab_size, shape)
    mask = np.ones(shape, np.int64)
    if shape[0] > 1:
        mask[0, -(shape[1] // 3) :] = 0
    ids[mask == 0] = manifest.text.pad_id
    classes = rng.integers(0, len(manifest.labels), shape[0]) if manifest.task == "classify" else None
    adapter: dict[str, Array] = {}
    scales = {}
    for index, (module, rank) in enumerate(zip(manifest.modules, ranks, strict=True)):
        adapter[f"{module.name}.lora_a"] = _normal(rng, (rank, module.in_features), module.in_features**-0.5)
        adapter[f"{module.name}.lora_b"] = _normal(rng, (module.out_features, rank), _B_SIZE * rank**-0.5)
        scales[module.name] = manifest.scale * (1 + 0.1 * (index % 3))  # differ, so that a mix-up shows
    for param in manifest.head.params:
        adapter[f"{manifest.head.module}.{param.name}"] = _normal(rng, param.shape, 0.05)
    return Case(name, Batch(ids, mask, classes), adapter, scales)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Array:
    return (std * rng.standard_normal(shape)).astype(np.float32)


def _grad_scale(case: Case) -> float:
    return 1.0 / len(case.batch.targets()[1])


def autograd(model: Any, manifest: Manifest, case: Case) -> tuple[float, dict[str, Array]]:
    """Summed loss and gradients of its mean by torch and peft, for the same adapter tensors, computed in float64."""
    with _peft_model(model, manifest, case) as wrapped:
        # With 30 blocks, the rounding of float32 products alone moves single gradients by 1e-4. Where a mask closes a
        # whole row, as a window does to padding, its float64 form overflows the float32 softmax.
        loss, grads = _differentiated(wrapped.double(), manifest, case)
        if not all(np.isfinite(grad).all() for grad in grads.values()):
            loss, grads = _differentiated(wrapped.float(), manifest, case)
    return loss, grads


def rounding_errors(model: Any, manifest: Manifest, case: Case, expected: Mapping[str, Array]) -> dict[str, float]:
    """How far the gradients are off that PyTorch computes in float32."""
    with quiet(), _peft_model(model, manifest, case) as wrapped:
        _, found = _differentiated(wrapped.float(), manifest, case)
    return relative_errors(found, expected)


@contextmanager
def _peft_model(model: Any, manifest: Manifest, case: Case) -> Iterator[Any]:
    """The model with the case's ranks and scales; it comes back without adapters, in float32."""
    ranks = {module.name: int(case.adapter[f"{module.name}.lora_a"].shape[0]) for module in manifest.modules}
    config = LoraConfig(
        task_type=manifest.peft.task_type,
        target_modules=list(manifest.peft.target_modules),
        r=manifest.r_max,
        lora_alpha=manifest.scale * manifest.r_max,
        rank_pattern=ranks,
        alpha_pattern={name: case.scales[name] * rank for name, rank in ranks.items()},
    )
    wrapped = get_peft_model(model, config).eval()
    try:
        yield wrapped
    finally:
        wrapped.unload()
        model.float()  # every float32 is a float64, so this brings back what was


def _differentiated(wrapped: Any, manifest: Manifest, case: Case) -> tuple[float, dict[str, Array]]:
    tensors = _peft_tensors(wrapped, manifest)
    wrapped.zero_grad()
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(case.adapter[name]))
    loss = _loss(wrapped, case.batch)
    (loss * _grad_scale(case)).backward()
    return float(loss.detach()), {name: tensor.grad.numpy().astype(np.float32) for name, tensor in tensors.items()}


def _peft_tensors(wrapped: Any, manifest: Manifest) -> dict[str, Any]:
    tensors = {}
    for module in manifest.modules:
        layer = wrapped.get_submodule(f"base_model.model.{module.name}")
        tensors[f"{module.name}.lora_a"] = layer.lora_A["default"].weight
        tensors[f"{module.name}.lora_b"] = layer.lora_B["default"].weight
    trained = sum(1 for name, value in wrapped.named_parameters() if value.requires_grad and ".lora_" in name)
    if trained != len(tensors):
        raise VerificationError(f"peft: expected {len(tensors)} LoRA factors by the manifest's targets, got {trained}")
    for param in manifest.head.params:
        head = wrapped.get_submodule(f"base_model.model.{manifest.head.module}.modules_to_save.default")
        tensors[f"{manifest.head.module}.{param.name}"] = head.get_parameter(param.name)
    return tensors


def _loss(wrapped: Any, batch: Batch) -> Any:
    logits = wrapped(input_ids=torch.from_numpy(batch.ids), attention_mask=torch.from_numpy(batch.mask)).logits
    (examples, positions), labels = batch.targets()
    chosen = logits if batch.classes is not None else logits[torch.from_numpy(examples), torch.from_numpy(positions)]
    return torch.nn.functional.cross_entropy(chosen, torch.from_numpy(labels), reduction="sum")
