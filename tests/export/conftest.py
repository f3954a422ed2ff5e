"""Exports made once a session: tracing takes seconds, so tests share three bundles and, where they can, graphs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # import mode "importlib" leaves it out

import export_models
from export_sessions import LABELS, Exported, run_export

from export import ExportOptions, pipeline
from export.quiet import quiet


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny models ``bert``, ``llama`` and ``qwen2``."""
    folder = tmp_path_factory.mktemp("models")
    with quiet():
        export_models.bert(folder / "bert")
        export_models.llama(folder / "llama")
        export_models.qwen2(folder / "qwen2")
    return folder


@pytest.fixture(scope="session")
def bert(workshop: Path) -> Exported:
    """Every linear layer of a BERT classifier, rank 6."""
    out = workshop / "bert.bundle"
    return run_export(ExportOptions(str(workshop / "bert"), "classify", out, rank=6, labels=LABELS, seed=3))


@pytest.fixture(scope="session")
def llama(workshop: Path) -> Exported:
    """Every linear layer of a Llama of three blocks, default rank."""
    return run_export(ExportOptions(str(workshop / "llama"), "lm", workshop / "llama.bundle", max_tokens=32))


@pytest.fixture(scope="session")
def qwen2(workshop: Path) -> Exported:
    """One linear layer of a Qwen2 whose two blocks attend differently."""
    return run_export(
        ExportOptions(str(workshop / "qwen2"), "lm", workshop / "qwen2.bundle", rank=4, targets=("k_proj",))
    )


@pytest.fixture
def traced_bert(bert: Exported, monkeypatch: pytest.MonkeyPatch) -> Exported:
    """Exports in this test get the BERT's graphs without tracing again."""
    monkeypatch.setattr(pipeline, "trace_model", lambda *_: bert.traced)
    return bert
