"""Models with random weights, their bundles and an adapter, made once in the folder of results and kept."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import UnavailableError
from bench.shapes import MODELS, RANK, Shape
from bench.systems import System
from edge_runtime.bundle import Array, open_bundle, write_peft_folder

_PIECE = 1 << 24  # values drawn at a time: memory does not grow with the model
_STD = 0.02  # of the weights, as transformers draws them
_ALIGN = 64 << 10
# Long sequences are measured as well; the bundle's limit is the exporter's.
_MAX_POSITIONS = 2_048


class Workshop:
    """One model's folder: ``model/``, ``bundle-{base}/``, ``adapter/`` and ``reference/``."""

    def __init__(self, out: Path, model: str) -> None:
        """``out`` is the folder of results, ``model`` a key of :data:`bench.shapes.MODELS`."""
        self.name = model
        self.shape = MODELS[model]
        self._folder = out.resolve() / model

    def model(self) -> Path:
        """The Hugging Face folder."""
        folder = self._folder / "model"
        if not folder.exists():
            stage = _fresh(folder)
            write_model(stage, self.shape)
            stage.rename(folder)
        return folder

    def bundle(self, system: System) -> Path:
        """The bundle of one of our systems.

        Raises:
            UnavailableError: the exporter makes none with this base; its own line says why.
        """
        base = system.removeprefix("emberlora-")
        own = ["--engine", system, "--ort-training-python", ort_python()] if system == "ort-training" else None
        folder = self._folder / f"bundle-{base}"
        if not folder.exists():
            command = [sys.executable, "-m", "edge_runtime.cli", "export", "--model", str(self.model()), "--task", "lm"]
            command += ["--rank", str(RANK), "--out", str(folder)]
            command += own or (["--base", base] if base != "fp32" else [])
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnavailableError(f"{system}: export failed: {last_line(done.stderr)}")
        return folder

    def adapter(self) -> Path:
        """A peft folder with random factors for any of the model's bundles."""
        folder = self._folder / "adapter"
        if not folder.exists():
            kept = sorted(self._folder.glob("bundle-*/manifest.json"))
            bundle = kept[0].parent if kept else self.bundle("emberlora-fp32")
            stage = _fresh(folder)
            _write_adapter(stage, bundle)
            stage.rename(folder)
        return folder

    def reference(self, case: str, pattern: str) -> Path:
        """Where the gradients are kept that the others are compared with."""
        folder = self._folder / "reference"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{case}-{pattern.replace('/', '_')}.npz"


def write_model(folder: Path, shape: Shape) -> None:
    """Write configuration, weights and a small tokenizer; no more than a piece of a tensor is in memory.

    Args:
        folder: Where to; made when it is not there.
        shape: The model. Its vocabulary is larger than the tokenizer's, which nothing minds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=1), encoding="utf-8")
    _write_weights(folder / "model.safetensors", dict(shape.tensors()))
    _write_tokenizer(folder)


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason was given")


def _config(shape: Shape) -> dict[str, Any]:
    name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[shape.family]
    return {
        "architectures": [name],
        "model_type": shape.family,
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    }


def _write_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file written as it is drawn: norms are ones, biases zero, the rest normal."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for values in _values(name, int(np.prod(shape)), rng):
                values.tofile(file)


def _values(name: str, count: int, rng: np.random.Generator) -> Iterator[Array]:
    for begin in range(0, count, _PIECE):
        size = min(_PIECE, count - begin)
        if "norm" in name:
            yield np.ones(size, np.float32)
        elif name.endswith(".bias"):
            yield np.zeros(size, np.float32)
        else:
            yield rng.standard_normal(size, dtype=np.float32) * np.float32(_STD)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "[UNK]": 2, **{f"word{i}": 3 + i for i in range(50)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def ort_python() -> str:
    """Interpreter of the environment with onnxruntime-training, which ``make test`` makes.

    Raises:
        UnavailableError: it is not there.
    """
    python = Path(__file__).parents[1] / ".venv-ort" / "bin" / "python"
    if not python.exists():
        raise UnavailableError("ort-training: no environment .venv-ort here: make test makes it")
    return str(python)


def _write_adapter(folder: Path, bundle: Path) -> None:
    opened = open_bundle(bundle, verify=False)
    rng = np.random.default_rng(1)
    tensors = {name: np.array(array) for name, array in opened.initial_adapter().items()}
    for name, array in tensors.items():
        if name.endswith("lora_b"):
            array[...] = rng.normal(scale=_STD, size=array.shape)
    write_peft_folder(folder, opened.manifest, tensors)


def _fresh(folder: Path) -> Path:
    """An empty folder beside ``folder``: what is half made never takes its name."""
    stage = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    return stage
