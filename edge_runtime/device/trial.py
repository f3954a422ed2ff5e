"""A machine on which ONNX Runtime does not compute is told so before it joins anything.

Wheels have been published that end the process by SIGILL on some processors (onnxruntime 1.21.0 on a Raspberry Pi 4);
only trying shows it, and only in another process can one live to tell.
"""

from __future__ import annotations

import asyncio
import json
import math
import platform
import sys
from collections.abc import Sequence

from edge_runtime.device.child import run_child
from edge_runtime.device.errors import EngineTrialError

ENGINE_TRIAL = (sys.executable, "-m", "edge_runtime.engine.trial")
_PATIENCE_S = 120.0  # the slowest boards import ONNX Runtime from a memory card; a second is usual


async def try_engine(command: Sequence[str] = ENGINE_TRIAL, *, patience_s: float = _PATIENCE_S) -> float | None:
    """Compute one product in a child process, and time a few.

    Args:
        command: The child's command line; exit code 0 says that the product was right, its output how long the
            calibration pass takes.
        patience_s: Seconds after which a child that says nothing counts as failed.

    Returns:
        Seconds of the calibration pass; None when the child does not say.

    Raises:
        EngineTrialError: the child did not end with 0; the message names the version and what to do.
    """
    try:
        ended = await asyncio.wait_for(run_child(command, b""), patience_s)
    except asyncio.TimeoutError as error:
        raise EngineTrialError(_line(f"no answer within {patience_s:g} s")) from error
    if ended.code != 0:
        raise EngineTrialError(_line(ended.describe()))
    return _calibration_s(ended.output)


def _calibration_s(output: bytes) -> float | None:
    try:
        seconds = json.loads(output)["calibration_s"]
    except (ValueError, TypeError, KeyError):
        return None
    return seconds if isinstance(seconds, float) and 0 < seconds < math.inf else None


def _line(what: str) -> str:
    from importlib import metadata  # a megabyte that a device without trouble does not load

    try:
        version = metadata.version("onnxruntime")
    except metadata.PackageNotFoundError:
        return "onnxruntime is not installed here: nothing was enrolled; run python -m pip install onnxruntime"
    return (
        f"onnxruntime {version} does not work on this machine ({platform.machine()}): {what}; nothing was enrolled; "
        f"{_other(version, sys.version_info[:2])}, and run enroll again"
    )


def _other(version: str, python: tuple[int, ...]) -> str:
    """What to install instead: 1.27 has none of the crashes that are known, which ``docs/boards.md`` names.

    For Python 3.10 there is nothing newer than 1.23.2.
    """
    if python < (3, 11):
        return "make an environment with Python 3.11 or newer, install emberlora in it"
    other = "--upgrade onnxruntime" if version.startswith("1.27.") else "'onnxruntime==1.27.*'"
    return f"install another version, python -m pip install {other}"
