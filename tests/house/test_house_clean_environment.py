"""What an install without extras gives: the edge runtime, able to train, and nothing heavy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.house.sources import ROOT, read_sources

pytestmark = [pytest.mark.house, pytest.mark.slow]

ABSENT = (
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnxscript",
    "sqlalchemy",
    "plotly",
    "rich",
    "sklearn",
    "safetensors",
)
# Declared by a dependency, imported by nothing here; left out by requirements-device.txt.
UNUSED = ("huggingface_hub", "hf_xet", "httpx2", "yaml", "sympy", "coloredlogs")
INSTALLS = {"plain": ("-c", "constraints.txt", "."), "device": ("--no-deps", "-r", "requirements-device.txt", ".")}


@pytest.fixture(scope="module", params=INSTALLS)
def install(request: pytest.FixtureRequest) -> str:
    """Which of the two installs the README offers to a device."""
    return str(request.param)


@pytest.fixture(scope="module")
def python(install: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with that install, made from a copy of the sources."""
    folder = tmp_path_factory.mktemp(install)
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "constraints.txt", "requirements-device.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("edge_runtime", "cloud", "export"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *INSTALLS[install]]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return python


def run(python: Path, *arguments: str | Path) -> str:
    """Run in the environment, away from the checkout, so that only what was installed is importable."""
    done = subprocess.run([python, *arguments], cwd=python.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_heavy_is_installed(python: Path, install: str) -> None:
    absent = ABSENT if install == "plain" else (*ABSENT, *UNUSED)
    find = "import importlib.util as u, sys; print([name for name in sys.argv[1:] if u.find_spec(name)])"
    assert run(python, "-c", find, *absent).strip() == "[]"


def test_every_edge_module_can_be_imported(python: Path) -> None:
    modules = [source.module for source in read_sources() if source.module.startswith("edge_runtime")]
    run(python, "-c", "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]", *modules)


def test_it_trains(python: Path, llama_bundle: Path, tmp_path: Path) -> None:
    """Tokenizer, graph cutting and engine work with what is installed."""
    data, out = tmp_path / "mine.jsonl", tmp_path / "adapter"
    data.write_text("".join(json.dumps({"text": f"word{i} word{i + 1} word{i}"}) + "\n" for i in range(4)))
    files = ("--bundle", llama_bundle, "--data", data, "--out", out)
    told = run(python, "-W", "error", "-m", "edge_runtime.cli", "edge", "train", *files, "--steps", "2", "--json")
    assert json.loads(told)["steps"] == 2
    assert (out / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("arguments", [("--help",), ("edge", "--help"), ("edge", "run", "--help")])
def test_the_command_helps(python: Path, arguments: tuple[str, ...]) -> None:
    script = python.parent / "emberlora"
    done = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Usage: emberlora" in done.stdout


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("export", ("export", "--model", "minilm", "--task", "classify", "--labels", "a,b", "--out", "bundle")),
        ("cloud", ("cloud", "serve", "--config", "emberlora.toml")),
        ("demo", ("demo",)),
    ],
)
def test_a_missing_extra_is_one_clear_line(
    python: Path, tmp_path: Path, extra: str, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "emberlora.toml").write_text('[task]\nname = "docs"\nbundle = "bundle"\n')
    script = python.parent / "emberlora"
    done = subprocess.run([script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2)
    assert f"pip install 'emberlora[{extra}]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_wire_does_not_load_the_engine() -> None:
    code = "import sys, edge_runtime.wire; print([name for name in sys.argv[1:] if name in sys.modules])"
    heavy = ("onnxruntime", "google.protobuf", "aiohttp", "tokenizers")
    done = subprocess.run([sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]"
