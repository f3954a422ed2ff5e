"""The adapter a bundle starts with: freshly drawn, or taken from a peft folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_runtime.bundle import Array, Head, Module
from export.errors import AdapterError
from export.sources import ADAPTER_CONFIG

_PREFIX = "base_model.model."
_PLAIN = {"use_dora": False, "bias": "none", "use_qalora": False, "lora_bias": False, "fan_in_fan_out": False}
HEAD_STD = 0.02  # of a new classification head, as BERT initialises it


@dataclass(frozen=True)
class PeftAdapter:
    """A peft folder, checked.

    ``factors`` maps a module's full name to (A, B) of shapes (r, in) and (out, r), B already carrying the module's own
    scale relative to ``scale``, so that one scale serves all.
    """

    base: str
    rank: int  # the largest of any module
    scale: float
    factors: dict[str, tuple[Array, Array]]
    head: dict[str, Array] = field(default_factory=dict)  # full parameter name -> values
    labels: tuple[str, ...] | None = None


def read_adapter(folder: Path) -> PeftAdapter:
    """Read a peft LoRA folder.

    Raises:
        AdapterError: not a LoRA folder, or it uses what a bundle cannot express (dropout, DoRA, trained biases, …).
    """
    config = _config(folder)
    _refuse_unsupported(folder, config)
    tensors = _tensors(folder)
    pairs: dict[str, dict[str, Array]] = {}
    head: dict[str, Array] = {}
    for key, value in tensors.items():
        name = key.removeprefix(_PREFIX)
        for mark in ("lora_A", "lora_B"):
            if name.endswith(f".{mark}.weight"):
                pairs.setdefault(name.removesuffix(f".{mark}.weight"), {})[mark] = value
                break
        else:
            head[name] = value
    broken = [name for name, pair in pairs.items() if len(pair) != 2]
    if broken or not pairs:
        raise AdapterError(f"adapter {folder}: expected pairs of lora_A and lora_B, got {broken or 'none'}")
    scale = _scaling(config, float(config["lora_alpha"]), int(config["r"]))
    factors = {}
    for name, pair in pairs.items():
        a, b = pair["lora_A"], pair["lora_B"]
        alpha = float(_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
        own = _scaling(config, alpha, a.shape[0])
        factors[name] = a, (b if own == scale else b * np.float32(own / scale))
    rank = max(a.shape[0] for a, _ in factors.values())
    return PeftAdapter(_base(folder, config), rank, scale, factors, head, read_labels(folder))


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA":
            raise AdapterError(f"adapter {folder}: expected peft_type LORA, got {config['peft_type']}")
        return {**config, "r": int(config["r"]), "lora_alpha": float(config["lora_alpha"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"adapter {folder}: {ADAPTER_CONFIG} is not a LoRA configuration: {error!r}") from error


def _refuse_unsupported(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("lora_dropout"):
        raise AdapterError(
            f"adapter {folder}: lora_dropout: expected 0, because devices recompute, got {config['lora_dropout']}"
        )
    others = [name for name, plain in _PLAIN.items() if config.get(name, plain) not in (plain, None)]
    others += [
        name for name in ("trainable_token_indices", "layer_replication", "target_parameters") if config.get(name)
    ]
    if others:
        raise AdapterError(f"adapter {folder}: a bundle cannot express {', '.join(others)}")


def _tensors(folder: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return {
            name: np.asarray(value, np.float32)
            for name, value in load_file(folder / "adapter_model.safetensors").items()
        }
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"adapter {folder}: adapter_model.safetensors cannot be read: {error}") from error


def _scaling(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Any, name: str, otherwise: Any) -> Any:
    """What a rank or alpha pattern says of a module: peft's own rule decides."""
    from peft.utils.other import get_pattern_key

    patterns = patterns or {}
    return patterns.get(get_pattern_key(patterns.keys(), name), otherwise)


def _base(folder: Path, config: Mapping[str, Any]) -> str:
    """The base model: a path relative to the adapter's folder where there is one, else as written."""
    base = str(config.get("base_model_name_or_path") or "")
    if not base:
        raise AdapterError(f"adapter {folder}: base_model_name_or_path: expected a folder or preset, got nothing")
    beside = folder / base
    return str(beside) if (beside / "config.json").is_file() else base


def read_labels(folder: Path) -> tuple[str, ...] | None:
    """The folder's ``labels.json``, the label of each class in order; None when there is no such file.

    Raises:
        AdapterError: the file is not a list of texts.
    """
    path = folder / "labels.json"
    if not path.is_file():
        return None
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"adapter {folder}: labels.json cannot be read: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise AdapterError(f"adapter {folder}: labels.json: expected a list of texts")
    return tuple(labels)


def initial_adapter(
    modules: Sequence[Module], head: Head, *, rank: int, seed: int, given: PeftAdapter | None
) -> dict[str, Array]:
    """Factors of every module at rank ``rank`` and the head's parameters, float32, named as the bundle names them.

    A is drawn as peft does (Kaiming uniform, a = √5) and B is zero; what ``given`` has replaces it. A module of lower
    rank keeps drawn rows of A beside zero columns of B: the product is unchanged and the new rows can still learn.

    Raises:
        AdapterError: ``given`` has tensors of other shapes, or some that belong to no module of the bundle.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Array] = {}
    for module in modules:
        lora_a = torch.empty(rank, module.in_features)
        torch.nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        tensors[f"{module.name}.lora_a"] = lora_a.numpy()
        tensors[f"{module.name}.lora_b"] = np.zeros((module.out_features, rank), np.float32)
    for param in head.params:
        values = torch.zeros(param.shape)
        if len(param.shape) > 1:
            values.normal_(0.0, HEAD_STD, generator=generator)
        tensors[f"{head.module}.{param.name}"] = values.numpy()
    if given is not None:
        _fill(tensors, given)
    return tensors


def _fill(tensors: dict[str, Array], given: PeftAdapter) -> None:
    for name, (a, b) in given.factors.items():
        rank = a.shape[0]
        mine_a, mine_b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        if a.shape[1] != mine_a.shape[1] or b.shape != (mine_b.shape[0], rank):
            raise AdapterError(f"adapter: {name}: shapes {a.shape} and {b.shape} do not fit the model's layer")
        mine_a[:rank], mine_b[:, :rank] = a, b
    for name, values in given.head.items():
        if name not in tensors or tensors[name].shape != values.shape:
            raise AdapterError(
                f"adapter: {name}: no trained parameter of this name and shape {values.shape} in the bundle"
            )
        tensors[name] = values
