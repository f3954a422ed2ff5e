"""Bundles for the engine ``ort-training``, and the interpreter that runs them.

onnxruntime-training takes the place of onnxruntime, so nothing of it runs in the process of the tests: bundles are
traced here, and artifacts made and trained by the interpreter of ``.venv-ort``, which ``make test`` sets up.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import LABELS, export

ENVIRONMENT = Path(__file__).parents[2] / ".venv-ort"


@pytest.fixture(scope="session")
def ort_python() -> Path:
    """The interpreter that has onnxruntime-training; without one, the tests are skipped and say why."""
    left_out, python = ENVIRONMENT / "left-out", ENVIRONMENT / "bin" / "python"
    if left_out.is_file():
        pytest.skip(left_out.read_text().strip())
    if not (ENVIRONMENT / ".setup").is_file():
        pytest.skip(f"no {ENVIRONMENT.name}: 'make test' makes it")
    return python


@pytest.fixture(scope="session")
def ort_bert(bert_folder: Path, ort_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same BERT as ``bert_bundle``."""
    options = ("--labels", ",".join(LABELS), "--engine", "ort-training", "--ort-training-python", str(ort_python))
    return export(bert_folder, "classify", tmp_path_factory.mktemp("ort") / "bert", *options)


@pytest.fixture(scope="session")
def ort_llama(llama_folder: Path, ort_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same Llama as ``llama_bundle``."""
    options = ("--engine", "ort-training", "--ort-training-python", str(ort_python))
    return export(llama_folder, "lm", tmp_path_factory.mktemp("ort") / "llama", *options)
