"""What every target of the edge tests has in common: the wheel, what torch made for it, and the run.

A target is a Python other than the checkout's own, with the project's wheel installed and no torch: another version
(:mod:`tests.targets.pythons`) or another processor (:mod:`tests.targets.arm64`). Its tests run in a copy of
``tests/edge``, away from the checkout, so that only what was installed can be imported.

Everything is kept below ``build/targets`` and made again only when the sources it comes from have changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "targets"
CONSTRAINTS = ROOT / "constraints.txt"
_PACKAGES = ("edge_runtime", "cloud", "export")
_JUNK = shutil.ignore_patterns("__pycache__")


class TargetError(Exception):
    """What stands in the way, in one line for the user."""


@dataclass(frozen=True)
class Inputs:
    """What a target needs from the host."""

    wheel: Path
    made: Path  # for pytest's --made: models, bundles and gradients
    tests: Path  # the copy of tests/edge with what it reads; the tests' working folder


def digest(*values: Path | str) -> str:
    """One digest over files, whole folders and texts."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, str):
            parts = [(value, b"")]
        elif value.is_dir():
            files = sorted(path for path in value.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
            parts = [(path.relative_to(value).as_posix(), path.read_bytes()) for path in files]
        else:
            parts = [(value.name, value.read_bytes())]
        for name, content in parts:
            total.update(f"{len(name)} {name} {len(content)} ".encode() + content)
    return total.hexdigest()


def kept(folder: Path, key: str, make: Callable[[Path], None], what: str) -> Path:
    """``folder`` as ``make`` filled it: kept while the key stays the same, made from nothing when it changes.

    An interrupted ``make`` leaves no key, so that the next call begins it anew.
    """
    mark = folder.with_name(f"{folder.name}.key")
    if folder.is_dir() and mark.is_file() and mark.read_text() == key:
        click.echo(f"{what}: kept from before, {folder.relative_to(ROOT)}")
        return folder
    click.echo(f"{what} …")
    mark.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(folder)
    mark.write_text(key)
    return folder


def call(command: Sequence[object], *, cwd: Path = ROOT, what: str) -> None:
    """Run a command quietly.

    Raises:
        TargetError: it failed; the message ends with what it said last.
    """
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-12:]
        raise TargetError("\n".join([f"{what} failed with exit code {done.returncode}:", *said]))


def prepare(target: str, pip_arguments: str) -> Inputs:
    """Make wheel, made things and the target's copy of the tests; this Python has everything, torch included."""
    sources = [ROOT / name for name in (*_PACKAGES, "pyproject.toml")]
    wheels = kept(BUILD / "wheel", digest(*sources), lambda out: build_wheel(out, pip_arguments), "wheel")
    key = digest(*sources, CONSTRAINTS, ROOT / "tests" / "conftest.py", ROOT / "tests" / "edge", str(_real_data()))
    made = kept(BUILD / "made", key, _make_with_torch, "models, bundles and gradients that take torch to make")
    tests = BUILD / f"{target}-tests"
    shutil.rmtree(tests, ignore_errors=True)
    shutil.copytree(ROOT / "tests" / "edge", tests / "tests" / "edge", ignore=_JUNK)
    shutil.copytree(ROOT / "docs", tests / "docs")
    shutil.copy(ROOT / "tests" / "conftest.py", tests / "tests")
    shutil.copy(ROOT / "pyproject.toml", tests)
    return Inputs(next(wheels.glob("*.whl")), made, tests)


def build_wheel(out: Path, pip_arguments: str, suffix: str = "") -> None:
    """From a copy: the checkout may hold files of earlier builds, which setuptools would pack again.

    Args:
        out: Folder for the wheel.
        pip_arguments: Options of pip, as one text.
        suffix: Added to the version, to make a newer one of the same sources.
    """
    copy = out / "sources"
    for name in _PACKAGES:
        shutil.copytree(ROOT / name, copy / name, ignore=_JUNK)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    settings = copy / "pyproject.toml"
    settings.write_text(re.sub(r'(?m)^version = "(.*)"$', rf'version = "\g<1>{suffix}"', settings.read_text()))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *shlex.split(pip_arguments)]
    call([*pip, "-w", out, copy], what="building the wheel")
    shutil.rmtree(copy)


def _make_with_torch(out: Path) -> None:
    """Set up every fixture of the edge tests, and run no test."""
    call([sys.executable, "-m", "pytest", "-q", "--setup-only", f"--made={out}", "tests/edge"], what="exporting")


def _real_data() -> Path | None:
    """The real data that some tests use, where it is at hand; the copy of the tests finds it by the environment."""
    folder = Path(os.environ.get("EMBERLORA_DATA", ROOT.parent / "shared" / "data"))
    return folder if folder.is_dir() else None


def install(python: Path, inputs: Inputs, constraints: Path, pip_arguments: str) -> None:
    """Install the wheel with the tests' packages, from wheels only: a device has no compiler."""
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:"]
    more = shlex.split(pip_arguments)
    call([*pip, *more, "-c", constraints, f"{inputs.wheel}[test]"], what="installing with wheels alone")


@dataclass(frozen=True)
class Counts:
    """How a run of pytest ended."""

    passed: int
    failed: int
    skipped: int

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def run_edge_tests(python: Path, inputs: Inputs, left_out: Sequence[str], more: Sequence[str]) -> Counts:
    """Run the copied edge tests; what happens is shown as it happens.

    Args:
        python: The target's interpreter, with the wheel installed.
        inputs: From :func:`prepare`.
        left_out: Marks of tests that cannot run on this target; each is named with its reason at the end.
        more: Further options of pytest.

    Raises:
        TargetError: a test failed, or one was skipped for want of a package.
    """
    report = inputs.tests / "report.xml"
    marks = " and ".join(f"not {mark}" for mark in left_out)
    # Without -c, pytest would take the settings, and with them the sources, of the checkout around this folder.
    command = [python, "-m", "pytest", "-c", "pyproject.toml", "-rs", "--installed", f"--made={inputs.made}"]
    command += [f"--junitxml={report}", "-m", marks, *more]
    data = _real_data()
    environ = {**os.environ, **({"EMBERLORA_DATA": str(data)} if data else {})}
    environ.pop("PYTHONPATH", None)  # the checkout would stand before what was installed
    done = subprocess.run([*map(str, command), "tests/edge"], cwd=inputs.tests, env=environ)
    counts, unable = read_report(report.read_text() if report.is_file() else "<none/>")
    if done.returncode:
        raise TargetError(f"the edge tests did not pass: {counts}, exit code {done.returncode}")
    if unable:
        raise TargetError(f"skipped for want of a package, mark it needs_torch or make it with `made`: {unable[0]}")
    return counts


def read_report(text: str) -> tuple[Counts, list[str]]:
    """The counts of a junit report, and which tests were skipped because something could not be imported."""
    cases = list(ET.fromstring(text).iter("testcase"))
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skips = [(case.get("name", ""), skip.get("message", "")) for case in cases for skip in case.iter("skipped")]
    unable = [name for name, message in skips if "could not import" in message]
    return Counts(len(cases) - failed - len(skips), failed, len(skips)), unable
