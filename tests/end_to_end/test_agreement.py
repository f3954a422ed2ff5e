"""What a device measures, transformers + peft measure too: the same texts, cut the same way, the same figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "edge_runtime.cli"]
LABELS = ("asyncio", "email", "tkinter", "xml")


def emberlora(*arguments: object) -> dict[str, float]:
    done = subprocess.run([*COMMAND, *map(str, arguments), "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result: dict[str, float] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_edge_eval_equals_peft_eval(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """After some training, on texts of which most are truncated and some are not."""
    bundle, model = request.getfixturevalue(f"{kind}_bundle"), request.getfixturevalue(f"{kind}_folder")
    texts = [" ".join(f"word{(i * 7 + j * 3) % 40}" for j in range(2 + i % 19)) for i in range(60)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": text, "label": LABELS[i % 4]}) for i, text in enumerate(texts)))
    out = tmp_path / "adapter"
    common = ("--data", data, "--max-tokens", 10)
    emberlora("edge", "train", "--bundle", bundle, *common, "--out", out, "--steps", 8, "--lr-a", 1e-2, "--lr-b", 1e-2)
    device = emberlora("edge", "eval", "--bundle", bundle, "--adapter", out, *common)
    judge = emberlora("peft-eval", "--model", model, "--adapter", out, *common)
    assert (device["metric"], device["examples"]) == (judge["metric"], judge["examples"])
    assert device["loss"] == pytest.approx(judge["loss"], rel=1e-4)
    assert device["value"] == pytest.approx(judge["value"], rel=1e-4)


def test_export_works_beside_the_engine(llama_folder: Path, llama_bundle: Path, tmp_path: Path) -> None:
    """In one process: the engine owns ONNX Runtime's thread pool, and an export still verifies its bundle."""
    code = (
        "import sys; from pathlib import Path; from export import ExportOptions, export_bundle;"
        "from edge_runtime.bundle import open_bundle; from edge_runtime.training.session import WorkingBundle;"
        "WorkingBundle(open_bundle(Path(sys.argv[1]))).engine;"
        "print(export_bundle(ExportOptions(sys.argv[2], 'lm', Path(sys.argv[3]), rank=2)).max_rel_err)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(llama_bundle), str(llama_folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4
