"""``bench.load`` without timing anything: a real aggregator process, a few devices, and what the line says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from bench.load import cases
from bench.load.__main__ import main
from bench.load.bundle import make_bundle
from bench.load.cases import CASES, Case, Line
from bench.load.server import Task
from cloud.errors import CloudError

TINY = Case("updates", 4096, Task(10, 1), Task(4, 6), connections=3, strangers=2)


def test_an_update_has_the_bytes_that_were_asked_for(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", update_bytes=1 << 16)
    assert bundle.initial_adapter()["layer.0.linear.lora_b"].nbytes == 1 << 16


def test_a_case_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round is answered by all devices; the line says how much went, and counts the strangers' rounds apart."""
    monkeypatch.setitem(CASES, "64kb", TINY)
    results = tmp_path / "load.jsonl"
    done = CliRunner().invoke(main, ["--case", "64kb", "--quick", "--results", str(results), "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "64kb: round 4/4" in done.stderr
    (text,) = results.read_text().splitlines()
    assert text in done.stdout
    line = msgspec.json.decode(text, type=Line)
    assert (line.case, line.updates, line.quick, line.connections) == ("64kb", 24, True, 3)
    assert 4096 < line.update_bytes < 4096 + 300
    assert line.mb_s * 1e6 == pytest.approx(line.updates_s * line.update_bytes, rel=0.2)
    assert line.p50_ms <= line.p99_ms
    assert line.p99_ratio is not None
    assert line.rss_growth == pytest.approx(line.rss_end_mb / line.rss_start_mb, rel=0.02)
    assert not list(tmp_path.glob("emberlora-load-*"))  # a gigabyte of updates is not left behind


def test_the_ratio_compares_every_other_round() -> None:
    """Rounds 1 and 3 ran beside strangers: their 99th percentiles are 40 and 60 ms, those of the others 20 and 30."""
    rounds = [[0.02] * 50, [0.04] * 50, [0.03] * 50, [0.06] * 50]
    assert cases._ratio(rounds) == 2.0


def test_an_aggregator_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "64kb", Case("updates", 4096, Task(1, 1), Task(1, 0), connections=1))
    done = CliRunner().invoke(main, ["--case", "64kb", "--quick", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit | CloudError)
