"""``make test-services``: the units of ``docs/systemd`` and the steps of ``docs/operations.md`` under a real systemd.

A Debian root is booted as a container (``systemd-nspawn``). The lines of the page's blocks are run in it as they stand,
by an administrator who has sudo and is not root; the package comes from the wheel of this checkout, everything else
from wheels that the host's pip fetched for the root's Python, so that the container needs no network. A tiny model's
task then runs with both sides as services: :mod:`tests.targets.service_steps`.

It needs root rights. What it cannot find: a fault of a whole machine's boot, or of a kernel other than the host's.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from tests.targets.container import Container
from tests.targets.edge_tests import BUILD, CONSTRAINTS, ROOT, TargetError, build_wheel, call, digest, kept
from tests.targets.service_steps import STEPS, Trial

# Debian's releases and their Python; the first is the system below most Raspberry Pi OS that run.
SUITES = {"bookworm": "3.11", "trixie": "3.13"}
PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "python3-venv", "sudo", "openssl", "ca-certificates")
GLIBCS = ("2_28", "2_27", "2_17")  # that wheels name; the roots' are newer
HOME = "srv/admin"  # of the administrator, with a checkout's documents
UPGRADE = "+trial"  # added to the version: a newer one, which the upgrade installs


@dataclass(frozen=True)
class Made:
    """What the host makes for the container."""

    root: Path  # a Debian root that was never booted
    wheels: Path  # of all that the packages need
    wheel: Path
    newer: Path  # the same sources as a newer version
    bundle: Path


def find_tools() -> None:
    """Look for everything that is needed.

    Raises:
        TargetError: naming it all in one line.
    """
    tools = {"systemd-container": "systemd-nspawn", "mmdebstrap": "mmdebstrap", "util-linux": "nsenter"}
    missing = [package for package, tool in tools.items() if shutil.which(tool) is None]
    if missing:
        raise TargetError(
            f"{' and '.join(missing)}: not found: on Debian or Ubuntu, "
            "apt-get install systemd-container mmdebstrap debian-archive-keyring"
        )
    if os.geteuid():
        raise TargetError("a container that boots needs root rights: sudo make test-services")


def prepare(suite: str, pip_arguments: str) -> Made:
    """Root, wheels and bundle, below ``build/targets``; kept until their sources change."""
    sources = [ROOT / name for name in ("edge_runtime", "cloud", "export", "pyproject.toml")]
    key = digest(*sources)
    wheel = kept(BUILD / "wheel", key, lambda out: build_wheel(out, pip_arguments), "wheel")
    newer = kept(
        BUILD / "wheel-newer", key, lambda out: build_wheel(out, pip_arguments, UPGRADE), "wheel of a newer version"
    )
    wheels = kept(
        BUILD / f"services-wheels-{SUITES[suite]}",
        digest(ROOT / "pyproject.toml", CONSTRAINTS),
        lambda out: _fetch(next(wheel.glob("*.whl")), out, SUITES[suite], pip_arguments),
        f"wheels for Python {SUITES[suite]}",
    )
    made = kept(BUILD / "services-made", digest(*sources, ROOT / "tests" / "conftest.py"), _export, "a tiny bundle")
    root = kept(
        BUILD / f"services-root-{suite}",
        digest(suite, *PACKAGES),
        lambda out: _make_root(out, suite),
        f"Debian {suite} with systemd",
    )
    return Made(root, wheels, next(wheel.glob("*.whl")), next(newer.glob("*.whl")), made / "bert-bundle")


def _fetch(wheel: Path, out: Path, python: str, pip_arguments: str) -> None:
    tags = [f"--platform=manylinux_{glibc}_{platform.machine()}" for glibc in GLIBCS]
    tags += [f"--platform=manylinux2014_{platform.machine()}", "--only-binary=:all:", f"--python-version={python}"]
    pip = [sys.executable, "-m", "pip", "download", "-q", "-d", out, "-c", CONSTRAINTS, *tags]
    call([*pip, *shlex.split(pip_arguments), f"{wheel}[cloud]"], what="fetching wheels")
    (out / wheel.name).unlink(missing_ok=True)  # the container gets that of today


def _export(out: Path) -> None:
    """Set up what the end-to-end tests begin with, and run none of them."""
    pytest = [sys.executable, "-m", "pytest", "-q", "--setup-only", f"--made={out}"]
    call([*pytest, "tests/end_to_end/test_task.py"], what="exporting")


def _make_root(out: Path, suite: str) -> None:
    include = f"--include={','.join(PACKAGES)}"
    call(["mmdebstrap", "--quiet", "--variant=minbase", include, suite, out], what="unpacking Debian's packages")


def furnish(root: Path, made: Made) -> None:
    """A copy of the root with wheels, a checkout's documents, and an administrator's home."""
    shutil.rmtree(root, ignore_errors=True)
    call(["cp", "--archive", "--reflink=auto", made.root, root], what="copying the root")
    wheels = root / "srv" / "wheels"
    shutil.copytree(made.wheels, wheels)
    shutil.copy(made.wheel, wheels)
    files = {
        "etc/pip.conf": "[global]\nno-index = true\nfind-links = /srv/wheels\n",
        "etc/hostname": "services\n",
        "etc/hosts": "127.0.0.1 localhost services ember.example\n",
        "etc/sudoers.d/admin": "admin ALL=(ALL) NOPASSWD: ALL\n",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    call(
        ["chroot", root, "useradd", "--create-home", f"--home-dir=/{HOME}", "--shell=/bin/bash", "admin"],
        what="making an administrator",
    )
    home = root / HOME
    home.chmod(0o700)
    shutil.copytree(ROOT / "docs", home / "docs")
    shutil.copytree(made.bundle, home / "bundle")


def run_steps(trial: Trial, steps: list[tuple[str, Callable[[Trial], None]]]) -> None:
    """One step after the other; the first that fails ends it, with the journals."""
    for name, step in steps:
        began = time.monotonic()
        try:
            step(trial)
        except (TargetError, AssertionError) as error:
            journals = "\n".join(trial.container.text(unit) for unit in ("emberlora-cloud", "emberlora-edge"))
            raise TargetError(f"{name}: {error}\n{journals}") from error
        click.echo(f"{name}: as expected ({time.monotonic() - began:.0f} s)")


def page_blocks(text: str) -> list[str]:
    """The blocks of commands of a page, in their order."""
    return re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@click.command()
@click.option("--pip-args", default="", help="Options of pip, as one text.")
@click.option("--suite", type=click.Choice([*SUITES]), default="bookworm", show_default=True, help="Debian's release.")
@click.option("--keep", is_flag=True, help="Leave the container's root where it is, to look at it.")
def main(pip_args: str, *, suite: str, keep: bool) -> None:
    """Try the units and the page's steps under systemd."""
    began = time.monotonic()
    root = BUILD / "services-run"
    try:
        find_tools()
        made = prepare(suite, pip_args)
        furnish(root, made)
        with Container(root, "services") as container:
            blocks = page_blocks((ROOT / "docs" / "operations.md").read_text(encoding="utf-8"))
            version = container.run("systemctl --version | head -1").strip()
            run_steps(Trial(container, blocks, made.newer), STEPS)
    except TargetError as error:
        raise click.ClickException(str(error)) from error
    finally:
        if not keep:
            shutil.rmtree(root, ignore_errors=True)
    click.echo(f"services ({version}): {len(STEPS)} passed, 0 failed in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
