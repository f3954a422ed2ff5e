"""``emberlora edge bench`` as a user calls it, on tiny models; nothing here looks at a time."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from edge_runtime.benchmark.cases import Job, next_plan_of, plan_of, settings_of
from edge_runtime.benchmark.host import device_name
from edge_runtime.bundle import MANIFEST_NAME, Manifest, adapter_shapes, file_entry, open_bundle
from edge_runtime.cli import main
from tests.edge.held import run_held

FIGURES = {
    *("steps", "step_ms_p50", "step_ms_p95", "tokens_per_s", "peak_private_mb", "peak_total_mb", "plan_change_ms"),
    *("update_bytes", "adapter_bytes"),
}
FRAME_BYTES = 88 + 60 + 48  # header and trailer of docs/wire.md, and what sealing adds


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["edge", "bench", *(str(argument) for argument in arguments)])


def test_what_is_reported(bert_bundle: Path, tmp_path: Path) -> None:
    """Every tier, with figures, bytes, operators, a length and a verdict; the page is written."""
    page = tmp_path / "bench.html"
    common = ("--quick", "--json", "--profile", "--html", page, "--tokens", 16, "--batch-size", 2, "--threads", 1)
    done = bench("--bundle", bert_bundle, *common)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["quick"] is True
    assert report["host"]["threads"] == 1
    (bundle,) = report["bundles"]
    assert bundle["base"] == "fp32"
    settings = [case["setting"] for case in bundle["cases"]]
    assert [(s["tier"], s["blocks_alive"], s["memory"]) for s in settings] == [
        (tier, alive, memory)
        for tier, alive in (("full", 3), ("upper half", 2), ("upper sixth", 1))
        for memory in ("keep", "recompute")
    ]
    for case in bundle["cases"]:
        assert case["failed"] is None
        assert set(case["figures"]) == FIGURES
        assert case["figures"]["steps"] == 3
        assert 0 < case["figures"]["peak_private_mb"] < case["figures"]["peak_total_mb"]
        _check_bytes(case, open_bundle(bert_bundle).manifest)
    shares = [operator["share"] for operator in bundle["operators"]["operators"]]
    assert sum(shares) == pytest.approx(1.0)
    assert shares == sorted(shares, reverse=True)
    assert 0 < bundle["matrix_share"] < 1
    assert [length["tokens"] for length in bundle["lengths"]] == [64]  # the model's limit
    assert bundle["verdict"]["tier"] == "full"
    assert bundle["verdict"]["longest_tokens"] == 64
    assert "all 3 blocks" in bundle["verdict"]["sentence"]
    assert page.read_text().count("<h2>") == 1


def _check_bytes(case: dict[str, Any], manifest: Manifest) -> None:
    """Up: every alive value and the head, sealed. Down: every value of the adapter, and the file's header."""
    lowest = len(manifest.blocks) - case["setting"]["blocks_alive"]
    alive = [module for module in manifest.modules if module.block >= lowest]
    values = sum(4 * (module.in_features + module.out_features) for module in alive)
    values += sum(map(math.prod, manifest.head_shapes.values()))
    assert case["figures"]["update_bytes"] == 4 * values + FRAME_BYTES
    shapes = adapter_shapes(manifest, dict.fromkeys(manifest.module_names, 4))
    assert case["figures"]["adapter_bytes"] > 4 * sum(map(math.prod, shapes.values()))


def test_a_table_for_people(llama_bundle: Path) -> None:
    """The tokens asked for are cut to the model's limit, which is said; nothing fits a budget of a megabyte."""
    done = bench("--bundle", llama_bundle, "--quick", "--tokens", 400, "--batch-size", 1, "--memory-budget-mb", 1)
    assert done.exit_code == 0, done.output
    assert "1 x 64 tokens a step" in done.stdout
    assert "No tier fits this device within 1 MiB" in done.stdout
    assert "64 tokens an example: the model's limit" in done.stderr


def test_settings_of_a_whole_run(llama_bundle: Path) -> None:
    """Three tiers, two ranks and int8 products at the full one, kept and recomputed; no two are equal."""
    manifest = open_bundle(llama_bundle).manifest
    settings = settings_of(manifest, quick=False)
    assert len(set(settings)) == len(settings) == 18
    assert {(s.rank, s.products) for s in settings} == {(4, "exact"), (2, "exact"), (4, "int8")}
    half = next(s for s in settings if s.tier == "upper half")
    assert [m.alive for m in plan_of(manifest, half)] == [""] * 7 + ["AB"] * 14
    assert [(m.rank, m.alive) for m in next_plan_of(manifest, half)] == [(2, "")] * 7 + [(2, "A")] * 7 + [(2, "B")] * 7


def test_int8_products_are_measured(llama_bundle: Path) -> None:
    """By a child, as the command would ask it."""
    settings = settings_of(open_bundle(llama_bundle).manifest, quick=False)
    setting = next(s for s in settings if s.products == "int8")
    job = Job("operators", str(llama_bundle), setting, 2, 16, 1, None, 2, 2, 0.0)
    command = [sys.executable, "-m", "edge_runtime.benchmark.child"]
    done = run_held(command, msgspec.json.encode(job))
    assert done.returncode == 0, done.stderr
    assert "DynamicQuantizeMatMul" in {found["name"] for found in json.loads(done.stdout)["operators"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bundle", "{folder}"), "not a bundle"),
        (("--bundle", "{bundle}", "--html", "{folder}/none/page.html"), "no such folder"),
        (("--bundle", "{bundle}", "--tokens", "2"), "--tokens"),
        ((), "--bundle"),
    ],
)
def test_bad_input_is_one_line(llama_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = bench(*(argument.format(folder=tmp_path, bundle=llama_bundle) for argument in arguments))
    assert done.exit_code == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert done.stdout == ""


def test_a_bundle_that_cannot_run_fails_with_the_childs_reason(llama_bundle: Path, tmp_path: Path) -> None:
    """Its graphs are unreadable, so every setting fails: exit code 1, one line, no traceback."""
    broken = tmp_path / "broken"
    shutil.copytree(llama_bundle, broken)
    _break_graphs(broken)
    done = bench("--bundle", broken, "--quick", "--tokens", 8)
    assert done.exit_code == 1
    assert "nothing could be measured" in done.stderr
    assert "GraphError" in done.stderr
    assert "Traceback" not in done.stderr


def _break_graphs(folder: Path) -> None:
    """Make every block graph unreadable, and the manifest say so, that the bundle is what it promises."""
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    for kind in manifest["kinds"]:
        (folder / kind["graph"]).write_bytes(b"no graph")
        entry = file_entry(folder / kind["graph"])
        manifest["files"][kind["graph"]] = {"sha256": entry.sha256, "bytes": entry.bytes}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_a_board_is_named_by_its_device_tree(tmp_path: Path) -> None:
    """Where there is none, by the processor; ARM's cpuinfo does not name one."""
    board, cpuinfo = tmp_path / "model", tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\n")
    assert device_name(board, cpuinfo) == "Fast CPU @ 3 GHz"
    board.write_bytes(b"Raspberry Pi 4 Model B Rev 1.4\0")
    assert device_name(board, cpuinfo) == "Raspberry Pi 4 Model B Rev 1.4"
