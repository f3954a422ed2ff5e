"""What the targets decide before anything long begins, and what they make of a run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.targets import arm64, board, edge_tests, pythons, service_steps, services
from tests.targets.edge_tests import Counts, TargetError


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An x86 without emulator and without Debian's tools."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_missing_tools_are_one_line(nothing_installed: None) -> None:
    with pytest.raises(TargetError, match=r"^qemu-user-static and mmdebstrap: not found: .*apt-get install qemu-user"):
        arm64.find_tools()


def test_a_missing_emulator_alone(nothing_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/mmdebstrap" if name == "mmdebstrap" else None)
    with pytest.raises(TargetError, match=r"^qemu-user-static: not found"):
        arm64.find_tools()


def test_services_name_what_is_missing(nothing_installed: None) -> None:
    with pytest.raises(TargetError, match=r"^systemd-container and mmdebstrap and util-linux: not found: .*apt-get"):
        services.find_tools()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users")
def test_services_need_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(TargetError, match=r"needs root rights: sudo make test-services$"):
        services.find_tools()


def test_the_page_has_every_block_that_the_services_are_tried_with() -> None:
    """A step finds its lines by how one begins; a page that was changed is noticed before anything boots."""
    blocks = services.page_blocks((edge_tests.ROOT / "docs" / "operations.md").read_text(encoding="utf-8"))
    beginnings = re.findall(r'\.block\("([^"]+)"\)', Path(service_steps.__file__).read_text(encoding="utf-8"))
    assert len(beginnings) >= 6
    assert [name for name in beginnings if len(service_steps.blocks_with(blocks, name)) != 1] == []


def test_an_arm_needs_no_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(TargetError, match="run make test-pythons"):
        arm64.find_tools()


@pytest.mark.skipif(not Path("/bin/sh").exists(), reason="no shell")
def test_the_launcher_keeps_its_own_name_and_every_argument(tmp_path: Path) -> None:
    """A stand-in for qemu shows what it is given; paths and arguments may hold blanks."""
    folder = tmp_path / "a b"
    folder.mkdir()
    qemu, python = folder / "qemu", folder / "python"
    qemu.write_text('#!/bin/sh\nfor part in "$@"; do echo "$part"; done\n')
    python.write_text(arm64.launcher(qemu, folder / "root", "cortex-a72"))
    for script in (qemu, python):
        script.chmod(0o755)
    ran = subprocess.run([python, "-c", "two words"], capture_output=True, text=True, check=True)
    root = f"{folder}/root"
    wanted = ["-L", root, "-cpu", "cortex-a72", "-0", str(python), f"{root}/usr/bin/python3", "-c", "two words"]
    assert ran.stdout.splitlines() == wanted


def test_another_onnxruntime_replaces_every_pin(tmp_path: Path) -> None:
    lines = arm64.pinned("1.23.2", tmp_path / "pins").read_text().splitlines()
    assert [line for line in lines if line.startswith("onnxruntime")] == ["onnxruntime==1.23.2"]
    untouched = arm64.pinned("", tmp_path / "pins").read_text()
    assert untouched.splitlines() == edge_tests.CONSTRAINTS.read_text().splitlines()


def test_the_board_has_four_cores(tmp_path: Path) -> None:
    board.write(tmp_path)
    assert (tmp_path / "proc" / "cpuinfo").read_text().count("0xd08") == 4
    assert (tmp_path / "sys/devices/system/cpu/cpu3/topology/cluster_cpus_list").read_text() == "0-3\n"


def test_a_folder_is_made_again_when_its_key_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_tests, "ROOT", tmp_path)
    folder, calls = tmp_path / "thing", []

    def make(out: Path) -> None:
        assert list(out.iterdir()) == []
        (out / "file").touch()
        calls.append(out)

    for key in ("one", "one", "two"):
        edge_tests.kept(folder, key, make, "a thing")
    assert len(calls) == 2


def test_an_interrupted_folder_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_tests, "ROOT", tmp_path)

    def interrupted(out: Path) -> None:
        (out / "half").touch()
        raise KeyboardInterrupt

    edge_tests.kept(tmp_path / "thing", "key", lambda out: None, "a thing")
    with pytest.raises(KeyboardInterrupt):
        edge_tests.kept(tmp_path / "thing", "other", interrupted, "a thing")
    edge_tests.kept(tmp_path / "thing", "key", lambda out: (out / "whole").touch(), "a thing")
    assert [path.name for path in (tmp_path / "thing").iterdir()] == ["whole"]


def test_the_digest_sees_names_contents_and_borders(tmp_path: Path) -> None:
    def of(**files: str) -> str:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        (tmp_path / "d" / "__pycache__").mkdir(parents=True)
        (tmp_path / "d" / "__pycache__" / "x").write_text(os.urandom(4).hex())
        for name, text in files.items():
            (tmp_path / "d" / name).write_text(text)
        return edge_tests.digest(tmp_path / "d")

    assert of(a="1", b="2") == of(b="2", a="1")
    assert len({of(a="1", b="2"), of(a="2", b="1"), of(a="12"), of(a="1", b=""), edge_tests.digest("a")}) == 5


REPORT = """<testsuites><testsuite>
  <testcase name="good"/>
  <testcase name="bad"><failure message="no"/></testcase>
  <testcase name="broken"><error message="no"/></testcase>
  <testcase name="elsewhere"><skipped message="no real data"/></testcase>
  <testcase name="lame"><skipped message="could not import 'torch'"/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted_and_a_missing_package_noticed() -> None:
    """A test that skips because torch is missing has proved nothing, and must be marked."""
    counts, unable = edge_tests.read_report(REPORT)
    assert (counts, unable) == (Counts(passed=1, failed=2, skipped=2), ["lame"])
    assert str(counts) == "1 passed, 2 failed, 2 skipped"


def test_this_very_version_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    monkeypatch.setattr(pythons, "places", lambda _: iter([Path("/bin/false"), Path(sys.executable)]))
    assert pythons.find_python(version) == Path(sys.executable)
    assert pythons.find_python("2.7") is None


def run_without_torch(*arguments: str) -> str:
    """What pytest says of the optimizer's comparison with torch where torch is not installed."""
    code = "import sys; sys.modules['torch'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    test = "tests/edge/engine/test_adamw.py::test_ten_steps_equal_torch"
    command = [sys.executable, "-c", code, "-q", "-rs", "-p", "no:cacheprovider", *arguments, test]
    return subprocess.run(command, cwd=edge_tests.ROOT, capture_output=True, text=True).stdout


def test_what_torch_did_not_make_is_skipped_in_a_checkout_and_missed_in_a_target(tmp_path: Path) -> None:
    """A target relies on its folder: to skip there would be to test nothing without a word."""
    assert "4 skipped" in run_without_torch()
    missed = run_without_torch(f"--made={tmp_path}")
    assert "4 errors" in missed
    assert "adamw.npz: it takes torch to make, and there is none here" in missed


def test_a_target_refuses_to_test_the_checkout() -> None:
    command = [sys.executable, "-m", "pytest", "--installed", "--collect-only", "-q", "tests/edge/wire"]
    done = subprocess.run(command, cwd=edge_tests.ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--installed: edge_runtime was imported from" in done.stderr
