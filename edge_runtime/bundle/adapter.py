"""Which tensors an adapter holds, and an adapter as a folder that ``peft`` loads.

Inside the project an adapter is a flat table: ``{module}.lora_a`` (r, in), ``{module}.lora_b`` (out, r) for every LoRA
module, dead or alive, and ``{head}.{param}`` for a trained head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.bundle.atomic import write_atomically
from edge_runtime.bundle.errors import TensorFileError
from edge_runtime.bundle.manifest import Manifest
from edge_runtime.bundle.tensors import Array, check_tensors, encode_tensors, map_tensors


def adapter_shapes(manifest: Manifest, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an adapter whose modules have these ranks."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in manifest.modules:
        rank = ranks[module.name]
        shapes[f"{module.name}.lora_a"] = (rank, module.in_features)
        shapes[f"{module.name}.lora_b"] = (module.out_features, rank)
    return shapes | manifest.head_shapes


def adapter_ranks(manifest: Manifest, tensors: Mapping[str, Array]) -> dict[str, int]:
    """The rank of every module, read from the shape of its ``lora_a``.

    Raises:
        TensorFileError: a module has no such factor, or it is not a matrix of rank 1 or more.
    """
    ranks = {}
    for name in manifest.module_names:
        factor = tensors.get(f"{name}.lora_a")
        if factor is None or factor.ndim != 2 or not len(factor):
            got = "none" if factor is None else f"shape {factor.shape}"
            raise TensorFileError(f"adapter: {name}.lora_a: expected a matrix (r, in), got {got}")
        ranks[name] = int(factor.shape[0])
    return ranks


def cut_ranks(manifest: Manifest, tensors: Mapping[str, Array], ranks: Mapping[str, int]) -> dict[str, Array]:
    """The adapter with only the first ``ranks[module]`` components of every module.

    The scale does not depend on the rank, so what is kept has the same effect as before.

    Raises:
        TensorFileError: a module has fewer components than asked for, or its factors do not fit each other.
    """
    present = adapter_ranks(manifest, tensors)
    short = [f"{name}: expected rank {ranks[name]} or more, got {r}" for name, r in present.items() if r < ranks[name]]
    if short:
        raise TensorFileError("adapter: " + "; ".join(short[:5]))
    cut = {name: array for name, array in tensors.items() if not name.endswith((".lora_a", ".lora_b"))}
    for name in manifest.module_names:
        rank, lora_b = ranks[name], tensors.get(f"{name}.lora_b")
        if lora_b is None or lora_b.ndim != 2 or lora_b.shape[1] != present[name]:
            got = "none" if lora_b is None else f"shape {lora_b.shape}"
            raise TensorFileError(f"adapter: {name}.lora_b: expected a matrix (out, {present[name]}), got {got}")
        cut[f"{name}.lora_a"] = np.ascontiguousarray(tensors[f"{name}.lora_a"][:rank])
        cut[f"{name}.lora_b"] = np.ascontiguousarray(lora_b[:, :rank])
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
    write_atomically(folder / "adapter_config.json", [json.dumps(_peft_config(manifest, ranks), indent=2).encode()])
    if manifest.labels:
        write_atomically(folder / "labels.json", [json.dumps(list(manifest.labels), indent=0).encode()])
    renamed = {_peft_key(name): array for name, array in tensors.items()}
    write_atomically(folder / "adapter_model.safetensors", [encode_tensors(renamed)])


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


def read_peft_folder(folder: Path, manifest: Manifest) -> dict[str, Array]:
    """Read an adapter that :func:`write_peft_folder` or ``peft`` wrote for this bundle's model.

    Raises:
        BundleMissingError: there is no ``adapter_model.safetensors``.
        TensorFileError: its tensors are not an adapter of this bundle, or its scale is another one.
    """
    stored = map_tensors(folder / "adapter_model.safetensors")
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
        alphas = _alphas(config, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TensorFileError(f"{folder}: adapter_config.json: no lora_alpha can be read from it") from error
    ours = {_our_name(name): array for name, array in stored.items()}
    ranks = adapter_ranks(manifest, ours)
    check_tensors(ours, adapter_shapes(manifest, ranks), what=str(folder))
    for name, rank in ranks.items():
        scale = alphas[name] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if not abs(scale - manifest.scale) <= 1e-6 * manifest.scale:
            raise TensorFileError(f"{folder}: {name}: alpha / r: expected {manifest.scale}, got {scale}")
    return ours


def _alphas(config: Mapping[str, Any], manifest: Manifest) -> dict[str, float]:
    """Alpha of every module. A pattern's key is a module's name or the end of it; peft takes the first that fits."""
    pattern = {key: float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()}
    default = float(config["lora_alpha"])
    return {
        name: next((alpha for key, alpha in pattern.items() if f".{name}".endswith(f".{key}")), default)
        for name in manifest.module_names
    }


def _our_name(key: str) -> str:
    name = key.removeprefix("base_model.model.")
    for ours, theirs in ((".lora_a", ".lora_A.weight"), (".lora_b", ".lora_B.weight")):
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name
