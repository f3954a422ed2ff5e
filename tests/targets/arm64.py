"""``make test-arm64``: the edge tests on an emulated 64-bit ARM board, with the wheels that such a board installs.

Debian's arm64 packages give the root, qemu's user-mode emulation runs its Python, and that Python's own pip installs
the project's wheel and the index's aarch64 wheels. Nothing of it needs root rights or an entry in the kernel's binfmt
table: the environment's ``python`` is a shell script that starts qemu, and ``sys.executable`` is that script, so that
child processes go through it too.

What it can find: a missing or wrong wheel, code that asks for x86, an instruction that the emulated processor does not
have (onnxruntime 1.21.0 dies on a Cortex-A72 here as it does on a Raspberry Pi 4). What it cannot: anything about
speed or memory, or a fault of real hardware.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import click

from tests.targets import board
from tests.targets.edge_tests import (
    BUILD,
    CONSTRAINTS,
    Inputs,
    TargetError,
    call,
    digest,
    install,
    kept,
    prepare,
    run_edge_tests,
)

# Debian 12 because Raspberry Pi OS, the system of the commonest boards, is built on it and has its Python, 3.11.
SUITE = "bookworm"
PACKAGES = ("python3", "python3-venv", "libstdc++6")
PROCESSOR = "cortex-a72"  # Raspberry Pi 4; no newer instruction than it has is emulated in the tests
# One product on each of them: Raspberry Pi 3, 4 and 5, a server, and everything that this qemu knows.
PROCESSORS = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "max")


def find_tools() -> tuple[Path, Path]:
    """``(qemu-aarch64, mmdebstrap)``.

    Raises:
        TargetError: naming the packages to install.
    """
    if platform.machine() in ("aarch64", "arm64"):
        raise TargetError("this machine is a 64-bit ARM itself: run make test-pythons")
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    mmdebstrap = shutil.which("mmdebstrap")
    missing = [name for name, found in (("qemu-user-static", qemu), ("mmdebstrap", mmdebstrap)) if not found]
    if qemu is None or mmdebstrap is None:
        raise TargetError(
            f"{' and '.join(missing)}: not found: on Debian or Ubuntu, "
            "apt-get install qemu-user-static mmdebstrap debian-archive-keyring"
        )
    return Path(qemu), Path(mmdebstrap)


def make_root(root: Path, mmdebstrap: Path) -> None:
    """Unpack Debian's packages and write the board's own files; no package's scripts run."""
    command: list[str | Path] = [
        mmdebstrap,
        "--quiet",
        "--variant=extract",
        "--mode=chrootless",
        "--architectures=arm64",
    ]
    call([*command, f"--include={','.join(PACKAGES)}", SUITE, root], what="unpacking Debian's arm64 packages")
    # Made for root only, and then qemu prefers them to the machine's: its terminals would not be found.
    shutil.rmtree(root / "dev", ignore_errors=True)
    board.write(root)


def launcher(qemu: Path, root: Path, processor: str) -> str:
    """A shell script that is the root's Python: environments made around it are found by its own path, ``$0``."""
    return f'#!/bin/sh\nexec "{qemu}" -L "{root}" -cpu {processor} -0 "$0" "{root}/usr/bin/python3" "$@"\n'


def make_environment(folder: Path, root: Path, scripts: dict[str, str]) -> None:
    """A virtual environment of the root's Python, whose interpreters are these scripts, with pip."""
    version = (root / "usr" / "bin" / "python3").readlink().name
    (folder / "bin").mkdir()
    (folder / "lib" / version / "site-packages").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text(f"home = {root}/usr/bin\ninclude-system-site-packages = false\n")
    for name, text in scripts.items():
        script = folder / "bin" / name
        script.write_text(text)
        script.chmod(0o755)
    call([folder / "bin" / "python", "-m", "ensurepip"], what="starting the emulated Python")


def pinned(onnxruntime: str, out: Path) -> Path:
    """The checkout's constraints, with another onnxruntime if one is asked for."""
    lines = CONSTRAINTS.read_text().splitlines()
    if onnxruntime:
        lines = [line for line in lines if not re.match(r"onnxruntime\b", line)] + [f"onnxruntime=={onnxruntime}"]
    out.write_text("\n".join([*lines, ""]))
    return out


def make_target(inputs: Inputs, onnxruntime: str, pip_arguments: str) -> Path:
    """The environment's folder: a Debian root, and in it a virtual environment with the wheels."""
    qemu, mmdebstrap = find_tools()
    key = digest(SUITE, *PACKAGES, Path(board.__file__))
    root = kept(BUILD / "arm64-root", key, lambda out: make_root(out, mmdebstrap), f"Debian {SUITE} for arm64")
    scripts = {"python": launcher(qemu, root, PROCESSOR)}
    scripts |= {f"python-{name}": launcher(qemu, root, name) for name in PROCESSORS}
    constraints = pinned(onnxruntime, BUILD / "arm64-constraints.txt")

    def make(folder: Path) -> None:
        make_environment(folder, root, scripts)
        install(folder / "bin" / "python", inputs, constraints, pip_arguments)

    return kept(
        root / "opt" / "emberlora",
        digest(key, inputs.wheel, constraints, *scripts.values()),
        make,
        "the base install with aarch64 wheels, by the emulated pip (some minutes)",
    )


def try_processors(environment: Path) -> None:
    """One product on each processor, as ``edge enroll`` tries it.

    Raises:
        TargetError: naming every processor on which ONNX Runtime does not work.
    """
    failed = []
    for name in PROCESSORS:
        command = [environment / "bin" / f"python-{name}", "-m", "edge_runtime.engine.trial"]
        done = subprocess.run([*map(str, command)], cwd=environment, capture_output=True, text=True)
        click.echo(f"one product on {name}: {'right' if done.returncode == 0 else f'exit code {done.returncode}'}")
        if done.returncode:
            failed.append(name)
    if failed:
        raise TargetError(f"ONNX Runtime does not work on {', '.join(failed)}")


@click.command()
@click.option("--pip-args", default="", help="Options of pip, as one text.")
@click.option("--onnxruntime", default="", metavar="VERSION", help="Test this version, not the one of constraints.txt.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(pip_args: str, onnxruntime: str, more: tuple[str, ...]) -> None:
    """Test on an emulated board; MORE goes to pytest."""
    try:
        find_tools()  # before the minutes that prepare() may take
        inputs = prepare("arm64", pip_args)
        environment = make_target(inputs, onnxruntime, pip_args)
        try_processors(environment)
        counts = run_edge_tests(environment / "bin" / "python", inputs, ["needs_torch", "not_emulated"], list(more))
    except TargetError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"arm64 ({PROCESSOR}, emulated): {counts}")


if __name__ == "__main__":
    main()
