"""What ``emberlora export --engine ort-training`` needs, and what it says when that is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.bundle import TRAINING_FILES, open_bundle
from tests.ort_training.supported import reason


def export(model: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edge_runtime.cli", "export", "--model", str(model), "--task", "lm"]
    command += ["--engine", "ort-training", "--out", str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("python", "words"),
    [
        (None, "onnxruntime-training: not in this environment"),
        ("no-such-python", "cannot be run: No such file"),
        ("without-emberlora", "No module named"),
    ],
)
def test_a_missing_package_is_one_line_before_any_work(
    python: str | None, words: str, llama_folder: Path, tmp_path: Path
) -> None:
    """Stock ONNX Runtime here, no such interpreter, or one without emberlora."""
    if python == "without-emberlora":
        isolated = tmp_path / python
        isolated.write_text(f'#!/bin/sh\ncd {tmp_path} && exec {sys.executable} -I -S "$@"\n')
        isolated.chmod(0o755)
    options = () if python is None else ("--ort-training-python", str(tmp_path / python))
    done = export(llama_folder, tmp_path / "bundle", *options)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert words in line
    assert "emberlora[ort-training]" in line or "no-such-python" in line
    assert not (tmp_path / "bundle").exists()


def test_the_bundle_is_the_four_files_and_ours(ort_llama: Path) -> None:
    manifest = open_bundle(ort_llama).manifest
    assert manifest.engine == "ort-training"
    assert set(manifest.files) == {*TRAINING_FILES, "adapter.safetensors", "tokenizer.json"}
    found = {path.relative_to(ort_llama).as_posix() for path in ort_llama.rglob("*") if path.is_file()}
    assert found == {*manifest.files, "manifest.json"}


@pytest.mark.parametrize(
    ("version", "system", "machine", "word"),
    [
        ((3, 10), "Linux", "x86_64", None),
        ((3, 12), "Darwin", "arm64", None),
        ((3, 13), "Linux", "x86_64", "ended with Python 3.12, this is 3.13"),
        ((3, 11), "Linux", "aarch64", "no wheel for Linux aarch64"),
    ],
)
def test_where_there_is_no_wheel_the_reason_is_told(
    version: tuple[int, int], system: str, machine: str, word: str | None
) -> None:
    found = reason(version, system, machine)
    assert found is None if word is None else word in (found or "")
