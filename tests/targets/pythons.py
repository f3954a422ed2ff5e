"""``make test-pythons``: the base install and the edge tests on every supported Python that this machine has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

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

VERSIONS = ("3.10", "3.11", "3.12", "3.13")


def places(version: str) -> Iterator[Path]:
    """Where an interpreter of this version may be."""
    found = shutil.which(f"python{version}")
    if found:
        yield Path(found)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from pyenv.glob(f"versions/{version}.*/bin/python{version}")
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local" / "share" / "uv" / "python"))
    yield from uv.glob(f"cpython-{version}.*/bin/python{version}")


def find_python(version: str) -> Path | None:
    """An interpreter of this version that can make environments; a launcher that leads nowhere is none."""
    code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for place in places(version):
        done = subprocess.run([place, "-c", code], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return place
    return None


def try_python(version: str, interpreter: Path, inputs: Inputs, pip_arguments: str) -> str:
    """Make the environment, run the tests; the counts, or the reason why not."""
    folder = BUILD / f"python{version}"

    def make(folder: Path) -> None:
        call([interpreter, "-m", "venv", folder], what="making an environment")
        install(folder / "bin" / "python", inputs, CONSTRAINTS, pip_arguments)

    try:
        kept(
            folder, digest(inputs.wheel, CONSTRAINTS, str(interpreter)), make, f"Python {version} with the base install"
        )
        return str(run_edge_tests(folder / "bin" / "python", inputs, ["needs_torch"], ["-q"]))
    except TargetError as error:
        return f"FAILED: {error}"


@click.command()
@click.option("--pip-args", default="", help="Options of pip, as one text.")
@click.argument("versions", nargs=-1)
def main(versions: tuple[str, ...], pip_args: str) -> None:
    """Test on these VERSIONS of Python, or on all that are supported and found."""
    try:
        inputs = prepare("pythons", pip_args)
    except TargetError as error:
        raise click.ClickException(str(error)) from error
    results = {}
    for version in versions or VERSIONS:
        interpreter = find_python(version)
        if interpreter is None:
            results[version] = "FAILED: not found" if versions else "not found on this machine, not tested"
        else:
            results[version] = try_python(version, interpreter, inputs, pip_args)
    for version, result in results.items():
        click.echo(f"Python {version:<5} {result}")
    tested = [result for result in results.values() if "passed" in result]
    sys.exit(0 if tested and not any("FAILED" in result for result in results.values()) else 1)


if __name__ == "__main__":
    main()
