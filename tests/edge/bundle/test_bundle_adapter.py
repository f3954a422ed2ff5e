"""Which tensors an adapter holds, how ranks are cut, and what a peft folder says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.bundle import (
    Array,
    BundleMissingError,
    Manifest,
    TensorFileError,
    adapter_ranks,
    adapter_shapes,
    cut_ranks,
    read_peft_folder,
    write_peft_folder,
)

RANKS = {
    "encoder.0.attention.query": 1,
    "encoder.0.output": 4,
    "encoder.1.attention.query": 2,
    "encoder.1.output": 3,
}


@pytest.fixture
def adapter(make_adapter: Any) -> dict[str, Array]:
    tensors: dict[str, Array] = make_adapter(RANKS)
    return tensors


def test_shapes(manifest: Manifest) -> None:
    assert adapter_shapes(manifest, RANKS) == {
        "encoder.0.attention.query.lora_a": (1, 6),
        "encoder.0.attention.query.lora_b": (4, 1),
        "encoder.0.output.lora_a": (4, 8),
        "encoder.0.output.lora_b": (6, 4),
        "encoder.1.attention.query.lora_a": (2, 6),
        "encoder.1.attention.query.lora_b": (4, 2),
        "encoder.1.output.lora_a": (3, 8),
        "encoder.1.output.lora_b": (6, 3),
        "classifier.weight": (3, 6),
        "classifier.bias": (3,),
    }


def test_ranks_are_read_from_shapes(manifest: Manifest, adapter: dict[str, Array]) -> None:
    assert adapter_ranks(manifest, adapter) == RANKS


@pytest.mark.parametrize(
    "wrong", [None, np.zeros(3, np.float32), np.zeros((), np.float32), np.zeros((0, 6), np.float32)]
)
def test_no_rank_to_read(manifest: Manifest, adapter: dict[str, Array], wrong: Array | None) -> None:
    name = "encoder.1.attention.query.lora_a"
    tensors = {key: array for key, array in adapter.items() if key != name} | ({} if wrong is None else {name: wrong})
    with pytest.raises(TensorFileError, match=rf"{name}: expected a matrix"):
        adapter_ranks(manifest, tensors)


@given(data=st.data())
def test_cut_ranks_is_slicing(manifest: Manifest, make_adapter: Any, data: st.DataObject) -> None:
    """The first components stay as they are; the head is untouched; nothing is a view of the whole."""
    full: dict[str, Array] = make_adapter(dict.fromkeys(manifest.module_names, 4))
    ranks = data.draw(st.fixed_dictionaries(dict.fromkeys(manifest.module_names, st.integers(1, 4))))
    cut = cut_ranks(manifest, full, ranks)
    assert {name: array.shape for name, array in cut.items()} == adapter_shapes(manifest, ranks)
    for name, rank in ranks.items():
        np.testing.assert_array_equal(cut[f"{name}.lora_a"], full[f"{name}.lora_a"][:rank])
        np.testing.assert_array_equal(cut[f"{name}.lora_b"], full[f"{name}.lora_b"][:, :rank])
        assert cut[f"{name}.lora_b"].flags.c_contiguous
    for name in ("classifier.weight", "classifier.bias"):
        np.testing.assert_array_equal(cut[name], full[name])
    again = cut_ranks(manifest, cut, dict.fromkeys(manifest.module_names, 1))
    once = cut_ranks(manifest, full, dict.fromkeys(manifest.module_names, 1))
    assert all((again[name] == once[name]).all() for name in once)


def test_cutting_cannot_grow(manifest: Manifest, adapter: dict[str, Array]) -> None:
    with pytest.raises(TensorFileError, match=r"encoder.0.attention.query: expected rank 2 or more, got 1$"):
        cut_ranks(manifest, adapter, RANKS | {"encoder.0.attention.query": 2})


@pytest.mark.parametrize("wrong", [None, np.zeros(4, np.float32), np.zeros((4, 0), np.float32)])
def test_cutting_needs_both_factors(manifest: Manifest, adapter: dict[str, Array], wrong: Array | None) -> None:
    name = "encoder.0.attention.query.lora_b"
    tensors = {key: array for key, array in adapter.items() if key != name} | ({} if wrong is None else {name: wrong})
    with pytest.raises(TensorFileError, match=rf"{name}: expected a matrix \(out, 1\), got"):
        cut_ranks(manifest, tensors, RANKS)


def test_peft_config(tmp_path: Path, manifest: Manifest, adapter: dict[str, Array]) -> None:
    write_peft_folder(tmp_path / "new" / "peft", manifest, adapter)
    folder = tmp_path / "new" / "peft"
    assert json.loads((folder / "adapter_config.json").read_bytes()) == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": "org/tiny",
        "r": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": ["attention.query", "output"],
        "rank_pattern": {"encoder.0.attention.query": 1, "encoder.1.attention.query": 2, "encoder.1.output": 3},
        "alpha_pattern": {"encoder.0.attention.query": 2.0, "encoder.1.attention.query": 4.0, "encoder.1.output": 6.0},
        "modules_to_save": ["classifier"],
    }
    assert json.loads((folder / "labels.json").read_bytes()) == ["no", "yes", "maybe"]
    stored = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert stored.keys() == {
        *(f"base_model.model.{name}.lora_{factor}.weight" for name in RANKS for factor in "AB"),
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }


def test_peft_folder_round_trip(tmp_path: Path, manifest: Manifest, adapter: dict[str, Array]) -> None:
    write_peft_folder(tmp_path, manifest, adapter)
    read = read_peft_folder(tmp_path, manifest)
    assert read.keys() == adapter.keys()
    assert all((read[name] == adapter[name]).all() for name in adapter)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("classifier.bias", None),
        ("encoder.0.output.lora_b", None),
        ("encoder.0.output.lora_a", None),
        ("encoder.0.output.lora_b", np.zeros((6, 3), np.float32)),
        ("classifier.bias", np.zeros(3, np.float64)),
        ("classifier.bias", np.full(3, np.nan, np.float32)),
        ("more", np.zeros(3, np.float32)),
    ],
)
def test_what_is_no_adapter_writes_nothing(
    tmp_path: Path, manifest: Manifest, adapter: dict[str, Array], name: str, array: Array | None
) -> None:
    tensors = {key: value for key, value in adapter.items() if key != name} | ({} if array is None else {name: array})
    with pytest.raises(TensorFileError, match=name):
        write_peft_folder(tmp_path / "peft", manifest, tensors)
    assert list(tmp_path.iterdir()) == []


def test_failing_write_leaves_the_old_files(
    tmp_path: Path, manifest: Manifest, adapter: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_peft_folder(tmp_path, manifest, adapter)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_peft_folder(tmp_path, manifest, {name: array + 1 for name, array in adapter.items()})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 4}, "encoder.0.output: alpha / r: expected 2.0, got 1.0"),
        ({"lora_alpha": "NaN"}, "got nan"),
        ({"alpha_pattern": {}}, "encoder.0.attention.query: alpha / r: expected 2.0, got 8.0"),
        ({"alpha_pattern": None, "rank_pattern": None}, "got 8.0"),
        ({"use_rslora": True}, "encoder.0.output: alpha / r: expected 2.0, got 4.0"),
        ({"lora_alpha": None}, "no lora_alpha"),
        ({"alpha_pattern": [1]}, "no lora_alpha"),
    ],
)
def test_peft_folder_of_another_scale_is_refused(
    tmp_path: Path, manifest: Manifest, adapter: dict[str, Array], change: dict[str, object], message: str
) -> None:
    write_peft_folder(tmp_path, manifest, adapter)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TensorFileError, match=message):
        read_peft_folder(tmp_path, manifest)


@pytest.mark.parametrize("config", [b"", b"{", b"[]", b"null", b"\xff", b"{}", b"[" * 100_000])
def test_garbage_config_is_refused(
    tmp_path: Path, manifest: Manifest, adapter: dict[str, Array], config: bytes
) -> None:
    write_peft_folder(tmp_path, manifest, adapter)
    (tmp_path / "adapter_config.json").write_bytes(config)
    with pytest.raises(TensorFileError, match=r"adapter_config\.json"):
        read_peft_folder(tmp_path, manifest)


def test_peft_folder_without_tensors(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(BundleMissingError):
        read_peft_folder(tmp_path, manifest)
