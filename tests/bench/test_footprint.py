"""The parts of ``bench.footprint`` that count and write, without timing anything."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from bench import footprint, idle
from bench.exporting import Stages
from bench.figures import Figure, append_figure
from bench.install import Size, package_sizes, size_of
from bench.replan import PATTERNS, Change, Changes, patterned
from cloud.config import parse_config, sample_config
from edge_runtime.bundle import open_bundle


def test_every_file_and_folder_counts_once(tmp_path: Path) -> None:
    """Bytecode is told apart, and what a link points to is not counted with it."""
    (tmp_path / "package" / "__pycache__").mkdir(parents=True)
    (tmp_path / "package" / "module.py").write_bytes(b"x" * 1000)
    (tmp_path / "package" / "__pycache__" / "module.pyc").write_bytes(b"x" * 300)
    folders = sum(path.stat().st_size for path in (tmp_path, tmp_path / "package", tmp_path / "package/__pycache__"))
    assert size_of(tmp_path) == Size(1300 + folders, 300)
    (tmp_path / "link").symlink_to(tmp_path / "package" / "module.py")
    assert 1300 < size_of(tmp_path).total - folders < 1300 + 1000
    assert Size(10, 4) - Size(7, 1) == Size(3, 3)


def test_packages_are_told_apart_by_what_they_recorded(tmp_path: Path) -> None:
    """The largest first; a recorded file that is gone counts nothing."""
    for name, files in {"small": {"small.py": 10}, "big": {"big/a.py": 500, "big/b.so": 600, "big/gone.py": 0}}.items():
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        for file, size in files.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            if size:
                (tmp_path / file).write_bytes(b"x" * size)
    assert list(package_sizes(tmp_path).items()) == [("big", 1100), ("small", 10)]


def test_a_figure_is_one_line_with_its_origin(tmp_path: Path) -> None:
    """The file grows; what is printed is what stands in it."""
    path = tmp_path / "results.jsonl"
    first = append_figure(path, Figure("install", 222.1, "MB", 220.0, {"packages": 33}), threads=2, quick=True)
    append_figure(path, Figure("idle-private", 26.1, "MiB"), threads=2, quick=False)
    lines = path.read_text().splitlines()
    assert lines[0] == first
    fields = json.loads(first)
    assert set(fields) == {"case", "value", "unit", "goal", "detail", "host", "commit", "quick"}
    assert (fields["value"], fields["goal"], fields["quick"]) == (222.1, 220.0, True)
    assert (fields["host"]["threads"], json.loads(lines[1])["goal"]) == (2, None)


def test_resident_memory_is_read_from_the_status_text() -> None:
    text = "VmRSS:\t   47000 kB\nRssAnon:\t   26000 kB\nRssFile:\t   20999 kB\nRssShmem:\t       1 kB\nThreads:\t3\n"
    assert idle.resident_kb(text) == {"RssAnon": 26000, "RssFile": 20999, "RssShmem": 1}


def test_the_idle_aggregator_waits_for_a_second_device(tmp_path: Path) -> None:
    """The sample config still has the lines that are changed, and stays a config."""
    path = tmp_path / "emberlora.toml"
    path.write_text(sample_config(task="idle", bundle="bundle", max_tokens=512, rank=2, rates=(1e-3, 4e-3)))
    idle._configure(path)
    config = parse_config(path.read_bytes(), path=path)
    assert (config.task.devices_per_round, config.task.min_devices, config.server.port) == (2, 2, 0)


def test_a_change_costs_what_its_first_step_took_longer() -> None:
    """Medians over the repeats, in seconds."""
    changes = tuple(Change(use_ms=5.0, first_step_ms=float(first), step_ms=100.0) for first in (395, 295, 1995))
    figure = footprint.change_figure("plan-change-first", changes, (40.0, 42.0, 41.0))
    assert (figure.value, figure.unit, figure.goal) == (0.3, "s", 0.3)
    expected = {"use_ms": 5.0, "first_step_ms": 395.0, "step_ms": 100.0, "engine_ms": 41.0, "repeats": 3}
    assert figure.detail == expected


def test_eight_patterns_of_being_alive(llama_bundle: Path) -> None:
    """All different, one a block in turn, in the order of the block's slots, and none is everything."""
    assert len(set(PATTERNS)) == 8
    assert ("AB",) * 7 not in PATTERNS
    manifest = open_bundle(llama_bundle).manifest
    plan = patterned(manifest, 3)
    assert {module.rank for module in plan} == {3}
    assert [module.name for module in plan] == list(manifest.module_names)
    assert tuple(module.alive for module in plan[14:21]) == PATTERNS[2]


def test_the_measuring_processes_answer(llama_bundle: Path) -> None:
    """A change of plan on a real bundle; the values are not looked at."""
    found = footprint._child(Changes, "bench.replan", llama_bundle, 1, 1)
    assert [len(part) for part in (found.engine_ms, found.first, found.again)] == [1, 1, 1]


@pytest.mark.slow
def test_an_export_is_timed_by_stage(llama_folder: Path, tmp_path: Path) -> None:
    stages = footprint._child(Stages, "bench.exporting", llama_folder, tmp_path / "bundle", 1)
    assert min(msgspec.structs.astuple(stages)) > 0
    assert stages.total_s == pytest.approx(stages.graphs_s + stages.writing_s + stages.verifying_s)
    assert open_bundle(tmp_path / "bundle").manifest.r_max == 8


def test_help_names_every_part() -> None:
    told = CliRunner().invoke(footprint.main, ["--help"])
    assert told.exit_code == 0
    assert all(part in told.output for part in footprint.PARTS)
