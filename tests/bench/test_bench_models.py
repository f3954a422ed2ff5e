"""The models of the measurement: what is written is the model that transformers builds from its configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.models import last_line, write_model
from bench.shapes import MODELS, Shape
from edge_runtime.bundle import map_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_loads_every_tensor(tmp_path: Path, family: str) -> None:
    """From a folder that is made on the way."""
    tmp_path /= "made/model"
    shape = Shape(family, 2, 64, 96, 4, 2, 200)
    write_model(tmp_path, shape)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    values = map_tensors(tmp_path / "model.safetensors")
    assert {name: array.shape for name, array in values.items()} == dict(shape.tensors())
    gate = "model.layers.1.mlp.gate_proj.weight"
    assert np.array_equal(values[gate], dict(model.named_parameters())[gate].detach().numpy())
    assert 0.015 < float(np.std(values[gate])) < 0.025
    assert transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True).is_fast


@pytest.mark.parametrize(
    ("name", "millions"), [("llama-6", 26), ("smollm2-135m", 135), ("qwen2.5-0.5b", 494), ("llama-1b", 1_236)]
)
def test_the_shapes_are_those_of_the_models_they_are_named_after(name: str, millions: int) -> None:
    count = sum(int(np.prod(shape)) for _, shape in MODELS[name].tensors())
    assert round(count / 1e6) == millions


def test_the_last_line_is_the_last_that_says_something() -> None:
    assert last_line("one\n  two  \n\n") == "two"
    assert last_line("\n") == "no reason was given"
