"""Before a device joins, its ONNX Runtime is tried in a child; how the child ends is told in one line."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from edge_runtime.device.errors import EngineTrialError
from edge_runtime.device.trial import try_engine


def child(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


SIGILL = child("import os, signal; os.kill(os.getpid(), signal.SIGILL)")


async def test_the_real_child_says_yes_here() -> None:
    seconds = await try_engine()
    assert seconds is not None
    assert 0 < seconds < 120


@pytest.mark.parametrize("said", ["", "{}", "[]", '{"calibration_s": 0.0}', '{"calibration_s": "fast"}', "NaN"])
async def test_a_child_that_does_not_say_how_fast_it_was_has_worked_all_the_same(said: str) -> None:
    assert await try_engine(child(f"print({said!r})")) is None


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (SIGILL, "the process was ended by SIGILL"),
        (child("import sys; sys.exit('a product of two matrices is off')"), "ended with code 1: a product of two"),
        (child("import nothing_of_that_name"), "No module named 'nothing_of_that_name'"),
    ],
)
async def test_a_bad_end_names_the_version_and_what_to_do(command: tuple[str, ...], what: str) -> None:
    version = metadata.version("onnxruntime")
    with pytest.raises(EngineTrialError) as raised:
        await try_engine(command)
    line = str(raised.value)
    assert line.startswith(f"onnxruntime {version} does not work on this machine (")
    assert what in line
    assert "nothing was enrolled" in line
    assert line.endswith(", and run enroll again")


@pytest.mark.parametrize(
    ("version", "python", "advice"),
    [
        ("1.23.2", (3, 10), "make an environment with Python 3.11 or newer, install emberlora in it"),
        ("1.24.4", (3, 11), "install another version, python -m pip install 'onnxruntime==1.27.*'"),
        ("1.27.0", (3, 13), "install another version, python -m pip install --upgrade onnxruntime"),
        ("1.28.0", (3, 11), "install another version, python -m pip install 'onnxruntime==1.27.*'"),
    ],
)
async def test_the_line_says_what_to_install_instead(
    monkeypatch: pytest.MonkeyPatch, version: str, python: tuple[int, int], advice: str
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    monkeypatch.setattr(sys, "version_info", (*python, 0))
    with pytest.raises(EngineTrialError) as raised:
        await try_engine(SIGILL)
    assert f"; nothing was enrolled; {advice}, and run enroll again" in str(raised.value)


async def test_a_child_that_hangs_is_given_up() -> None:
    with pytest.raises(EngineTrialError, match=r"no answer within 0\.2 s"):
        await try_engine(child("import time; time.sleep(60)"), patience_s=0.2)


async def test_without_onnxruntime_the_line_says_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(EngineTrialError, match="onnxruntime is not installed here: nothing was enrolled"):
        await try_engine(SIGILL)
