"""Processes: output, failure with its log, and that none outlives the demo."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from cloud.demo import processes
from cloud.demo.errors import CommandFailedError
from cloud.demo.processes import Processes


@pytest.fixture(autouse=True)
def plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs ``python -c CODE`` where the demo would run ``emberlora …``."""
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c"))


def test_a_command_gives_its_output(tmp_path: Path) -> None:
    with Processes(tmp_path) as running:
        assert running.call("hello", "print('hi')").strip() == "hi"


def test_a_failure_names_its_last_line_and_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as running, pytest.raises(CommandFailedError, match="bad ended with status 3: no bundle"):
        running.call("bad", "import sys; print('no bundle', file=sys.stderr); sys.exit(3)")
    assert (tmp_path / "bad.log").read_text().strip() == "no bundle"


def test_background_lines_arrive_and_the_end_is_told(tmp_path: Path) -> None:
    with Processes(tmp_path) as running:
        running.start("device", "print('{\"step\": 1}'); print('not json')")
        found = running.events(timeout_s=20)
        assert next(found).fields == {"step": 1}
        assert next(found).fields is None
    assert (tmp_path / "device.jsonl").read_text().splitlines() == ['{"step": 1}', "not json"]


def test_a_background_failure_is_raised(tmp_path: Path) -> None:
    with Processes(tmp_path) as running:
        running.start("device", "raise SystemExit('out of memory')")
        with pytest.raises(CommandFailedError, match="device ended with status 1: out of memory"):
            next(running.events(timeout_s=20))


def test_silence_ends_the_wait(tmp_path: Path) -> None:
    with Processes(tmp_path) as running:
        running.start("device", "import time; time.sleep(60)")
        with pytest.raises(CommandFailedError, match="nothing happened"):
            next(running.events(timeout_s=0.2))


def test_nothing_outlives_the_demo(tmp_path: Path) -> None:
    """A process and its child are both gone when the demo ends, also when it ends by an exception."""
    code = (
        "import json, subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(json.dumps({'pid': child.pid}), flush=True); time.sleep(60)"
    )
    running = Processes(tmp_path)
    running.start("device", code)
    fields = next(running.events(timeout_s=20)).fields
    assert fields is not None
    assert _alive(fields["pid"])
    with pytest.raises(KeyboardInterrupt), running:
        raise KeyboardInterrupt
    deadline = time.monotonic() + 10
    while _alive(fields["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(fields["pid"])


def _alive(pid: int) -> bool:
    """Running, and not only waiting for its parent to notice its end."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
