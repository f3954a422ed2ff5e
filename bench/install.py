"""What an install adds to an empty environment, file by file and package by package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import click

from bench.figures import Figure

ROOT = Path(__file__).parents[1]
_PACKAGES = ("edge_runtime", "cloud", "export")
_FILES = ("pyproject.toml", "constraints.txt", "requirements-device.txt", "README.md", "LICENSE")
GOAL_MB = 220.0
# Name of the case -> arguments of pip, from a copy of the sources.
INSTALLS = {
    "install": ("-c", "constraints.txt", "."),
    "install-device": ("--no-deps", "-r", "requirements-device.txt", "."),
}
_SHOWN = 12


@dataclass(frozen=True)
class Size:
    """Bytes of a folder: everything in it, folders as well (as ``du -sb`` counts), and compiled bytecode alone."""

    total: int = 0
    bytecode: int = 0

    def __sub__(self, other: Size) -> Size:
        return Size(self.total - other.total, self.bytecode - other.bytecode)


def size_of(folder: Path) -> Size:
    """Count a folder; links are counted, not followed."""
    sizes = [(path.suffix, path.lstat().st_size) for path in [folder, *folder.rglob("*")]]
    return Size(sum(size for _, size in sizes), sum(size for suffix, size in sizes if suffix == ".pyc"))


def package_sizes(site: Path) -> dict[str, int]:
    """Bytes of every distribution in a site-packages folder, bytecode included, the largest first."""
    sizes = {}
    for distribution in distributions(path=[str(site)]):
        files = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
        sizes[distribution.name] = sum(file.stat().st_size for file in files if file.exists())
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def measure_installs(folder: Path) -> Iterator[Figure]:
    """Install in fresh environments under ``folder``; one figure an install, and one without bytecode."""
    source = folder / "source"
    source.mkdir()
    for name in _PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _FILES:
        shutil.copy(ROOT / name, source / name)
    for case, arguments in INSTALLS.items():
        yield from _measure(case, arguments, folder / case, source)


def _measure(case: str, arguments: tuple[str, ...], place: Path, source: Path) -> Iterator[Figure]:
    venv.create(place, with_pip=True, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(place)}))
    empty, before = size_of(site), package_sizes(site)
    command = [str(place / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{case}: pip failed: {done.stderr.strip()}")
    added = size_of(site) - empty
    packages = {name: size for name, size in package_sizes(site).items() if name not in before}
    largest = {name: _mb(size) for name, size in list(packages.items())[:_SHOWN]}
    detail = {"packages": len(packages), "largest_mb": largest, "python": sys.version.split()[0]}
    yield Figure(case, _mb(added.total), "MB", GOAL_MB, detail)
    yield Figure(f"{case}-without-bytecode", _mb(added.total - added.bytecode), "MB")


def _mb(size: int) -> float:
    return round(size / 1e6, 2)
