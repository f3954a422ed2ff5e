"""Which tensors an adapter holds, and an adapter as a folder that ``peft`` loads.

Inside the project an adapter is a flat table: ``{module}.lora_a`` (r, in), ``{module}.lora_b`` (out, r) for every LoRA
module, dead or alive, and ``{head}.{param}`` for a trained head.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge_runtime.bundle.manifest import Manifest
from edge_runtime.bundle.tensors import Array, check_tensors, encode_tensors


def adapter_shapes(manifest: Manifest, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an adapter whose modules have these ranks."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in manifest.modules:
        rank = ranks[module.name]
        shapes[f"{module.name}.lora_a"] = (rank, module.in_features)
        shapes[f"{module.name}.lora_b"] = (module.out_features, rank)
    for param in manifest.head.params:
        shapes[f"{manifest.head.module}.{param.name}"] = param.shape
    return shapes


def adapter_ranks(manifest: Manifest, tensors: Mapping[str, Array]) -> dict[str, int]:
    """The rank of every module, read from the shapes of its factors."""
    return {name: int(tensors[f"{name}.lora_a"].shape[0]) for name in manifest.module_names}


def cut_ranks(manifest: Manifest, tensors: Mapping[str, Array], ranks: Mapping[str, int]) -> dict[str, Array]:
    """The adapter with only the first ``ranks[module]`` components of every module.

    The scale does not depend on the rank, so what is kept has the same effect as before.
    """
    cut = {name: array for name, array in tensors.items() if not name.endswith((".lora_a", ".lora_b"))}
    for name in manifest.module_names:
        rank = ranks[name]
        cut[f"{name}.lora_a"] = np.ascontiguousarray(tensors[f"{name}.lora_a"][:rank])
        cut[f"{name}.lora_b"] = np.ascontiguousarray(tensors[f"{name}.lora_b"][:, :rank])
    return cut


def write_peft_folder(folder: Path, manifest: Manifest, tensors: Mapping[str, Array]) -> None:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and, for a classifier, ``labels.json``.

    ``rank_pattern`` and ``alpha_pattern`` are written where ranks differ, so that ``alpha / r`` is the bundle's scale
    in every module.

    Raises:
        TensorFileError: the tensors are not an adapter of this bundle.
    """
    ranks = adapter_ranks(manifest, tensors)
    check_tensors(tensors, adapter_shapes(manifest, ranks), what="adapter")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "adapter_config.json", json.dumps(_peft_config(manifest, ranks), indent=2).encode())
    if manifest.labels:
        _write(folder / "labels.json", json.dumps(list(manifest.labels), indent=0).encode())
    _write(folder / "adapter_model.safetensors", encode_tensors({_peft_key(k): v for k, v in tensors.items()}))


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _peft_key(name: str) -> str:
    for ours, theirs in ((".lora_a", ".lora_A.weight"), (".lora_b", ".lora_B.weight")):
        if name.endswith(ours):
            return f"base_model.model.{name.removesuffix(ours)}{theirs}"
    return f"base_model.model.{name}"


def _peft_config(manifest: Manifest, ranks: Mapping[str, int]) -> dict[str, object]:
    differing = {name: rank for name, rank in ranks.items() if rank != manifest.r_max}
    return {
        "peft_type": "LORA",
        "task_type": manifest.peft.task_type,
        "base_model_name_or_path": manifest.peft.base_model,
        "r": manifest.r_max,
        "lora_alpha": manifest.scale * manifest.r_max,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(manifest.peft.target_modules),
        "rank_pattern": differing,
        "alpha_pattern": {name: manifest.scale * rank for name, rank in differing.items()},
        "modules_to_save": [manifest.head.module] if manifest.head.module else None,
    }
