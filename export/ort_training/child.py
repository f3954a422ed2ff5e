"""Runs ``python -m edge_runtime.engine.ort_training`` in the environment that has onnxruntime-training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from export.errors import ExtraMissingError, TraceError

_MODULE = "edge_runtime.engine.ort_training"
_MISSING = ("No module named", "not in this environment", "onnxruntime: cannot be imported")


def run_child(python: Path | None, *arguments: str | Path) -> None:
    """Run one of the module's commands.

    Args:
        python: Interpreter of that environment; None is this one.
        arguments: The command and its arguments.

    Raises:
        ExtraMissingError: there is no such interpreter, or its environment lacks onnxruntime-training or emberlora.
        TraceError: the command failed.
    """
    program = str(python or sys.executable)
    # What makes this process's packages importable must not reach an interpreter that has its own.
    environment = {name: value for name, value in os.environ.items() if python is None or name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            [program, "-W", "ignore", "-m", _MODULE, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
    except OSError as error:
        raise ExtraMissingError(f"--ort-training-python: {program}: cannot be run: {error.strerror}") from error
    if done.returncode == 0:
        return
    lines = done.stderr.strip().splitlines()
    said = lines[-1].removeprefix("Error: ") if lines else f"ended with code {done.returncode}"
    if any(words in said for words in _MISSING):
        raise ExtraMissingError(
            f"--ort-training-python: {program}: {said}: give the interpreter of an environment where "
            "'emberlora[ort-training]' is installed as the README says"
        )
    raise TraceError(f"onnxruntime-training: {arguments[0]}: {said:.300}")
