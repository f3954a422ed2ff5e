"""The command from beginning to end on a tiny model. What it times is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SYSTEMS = ("emberlora-fp32", "torch-eager", "ort-training", "gemm-floor")
PATTERNS = ("1/3", "B")  # a kill of whole blocks, and of one factor


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.step", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench") / "out"


def test_a_run_measures_what_can_be_measured_and_draws_it(out: Path) -> None:
    systems = [word for system in SYSTEMS for word in ("--system", system)]
    done = run(out, *systems, "--case", "tiny", "--quick", "--turns", "1", "--alive", ",".join(PATTERNS))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] == lines
    measured = {(line["system"], line["setting"], line["pattern"]) for line in lines}
    remembered = "emberlora-fp32", "keep, mapped, remembered", "1/3"
    assert [key for key in measured if key[1].endswith("remembered") and key[0] != "gemm-floor"] == [remembered]
    assert ("gemm-floor", "keep, mapped, remembered", "1/3") in measured
    for pattern in PATTERNS:
        for activations in ("keep", "recompute"):
            assert ("emberlora-fp32", f"{activations}, mapped", pattern) in measured
            assert ("gemm-floor", f"{activations}, mapped", pattern) in measured
        assert ("gemm-floor", "keep, packed", pattern) in measured
        assert ("torch-eager", "keep", pattern) in measured
    errors = {(line["system"], line["setting"], line["pattern"]): line["grad_rel_err"] for line in lines}
    assert 1e-5 < errors.pop(remembered) < 1e-2, "half precision must be seen, or nothing was recalled"
    assert all(error < 1e-5 for (system, _, _), error in errors.items() if system == "emberlora-fp32")
    assert all(errors["torch-eager", "keep", pattern] == 0 for pattern in PATTERNS)
    assert errors["gemm-floor", "keep, mapped", "B"] is None
    assert all(line["peak_total_mb"] > line["peak_private_mb"] > 0 for line in lines)
    for line in lines:
        inside = [line[f"{part}_ms_median"] for part in ("runtime", "optimizer", "other")] + [line["kept_mb"]]
        ours = line["system"] == "emberlora-fp32"
        assert all((part is not None and part > 0) if ours else part is None for part in inside)
    kept = {(line["setting"], line["pattern"]): line["kept_mb"] for line in lines if line["system"] == "emberlora-fp32"}
    assert kept["recompute, mapped", "1/3"] < kept["recompute, mapped", "B"] < kept["keep, mapped", "B"]
    assert kept["keep, mapped", "1/3"] == kept["keep, mapped, remembered", "1/3"] < kept["keep, mapped", "B"]
    assert "tiny, 50% alive (B)" in done.stderr
    # make test makes its environment; without one, a line says so.
    tried = "ort-training" in {line["system"] for line in lines}
    assert tried != ("not run: ort-training: " in done.stderr)
    assert (out / "step.html").stat().st_size > 1 << 20


def test_a_later_run_appends_and_the_picture_can_be_drawn_alone(out: Path) -> None:
    before = (out / "results.jsonl").read_text()
    done = run(
        out, "--system", "gemm-floor", "--setting", "keep", "--setting", "mapped", "--case", "tiny", "--turns", "1"
    )
    assert done.returncode == 0, done.stderr
    after = (out / "results.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 1
    (out / "step.html").unlink()
    assert run(out, "--picture-only").returncode == 0
    assert (out / "step.html").exists()
    assert (out / "results.jsonl").read_text() == after


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--alive", "7/6"), "--alive: expected a fraction"),
        (("--picture-only",), "nothing was measured yet"),
        (("--system", "emberlora-fp32", "--setting", "remembered"), "1 alive leaves no dead block at the bottom"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
