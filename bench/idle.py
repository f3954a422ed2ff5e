"""Memory of a device process that has done a round and waits for the next one.

A real aggregator on loopback, a real ``emberlora edge run`` with its training child, a small model: the resident
process holds neither model nor data, so neither's size is in the figure.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import click

from bench.figures import Figure
from bench.models import write_model
from bench.shapes import Shape

GOAL_MIB = 50.0
_COMMAND = (sys.executable, "-m", "edge_runtime.cli")
_PATIENCE_S = 120.0
_SETTLE_S = 3.0  # after the update was sent: garbage collected, the long poll open
_SAMPLES = 10
_SHAPE = Shape("llama", 1, 36, 96, 9, 3, 64)
# One device of the two that a round waits for: its update is sent, and the round stays open.
_CONFIG = {"rounds": 2, "devices_per_round": 2, "min_devices": 2, "port": 0, "max_tokens": 16}
_BASE_KB = re.compile(r"^(Rss\w+):\s+(\d+) kB$", re.MULTILINE)


def resident_kb(status: str) -> dict[str, int]:
    """``RssAnon``, ``RssFile`` and ``RssShmem`` of a ``/proc/PID/status`` text, in KiB."""
    return {name: int(value) for name, value in _BASE_KB.findall(status)}


def measure_idle(folder: Path) -> Iterator[Figure]:
    """Bring an aggregator and a device into being under ``folder``; private and total memory of the device.

    Raises:
        ClickException: a command failed or nothing happened, with the log to look at; or the system has no /proc.
    """
    if not Path("/proc/self/status").exists():
        raise click.ClickException("idle: needs /proc, which this system does not have")
    write_model(folder / "model", _SHAPE)
    _run("export", "--model", folder / "model", "--task", "lm", "--rank", 2, "--out", folder / "bundle")
    (folder / "mine.jsonl").write_text('{"text": "word1 word2 word3 word4"}\n' * 4, encoding="utf-8")
    server = folder / "server"
    _run("cloud", "init", server, "--bundle", folder / "bundle", "--task", "idle")
    _configure(server / "emberlora.toml")
    with _running(folder / "server.log", "cloud", "serve", "--config", server) as aggregator:
        address = server / "data" / "server.url"
        _until(address.exists, aggregator, folder / "server.log")
        token = _run("cloud", "token", "--config", server, "--device", "idler").strip()
        home = ("--home", folder / "home")
        data = ("--data", folder / "mine.jsonl")
        url = address.read_text(encoding="utf-8").strip()
        _run("edge", "enroll", "--server", url, "--token", token, "--name", "idler", *home, *data)
        log = folder / "device.log"
        with _running(log, "edge", "run", *home, "--json") as device:
            _until(lambda: "uploaded" in _events(log), device, log)
            time.sleep(_SETTLE_S)
            yield from _figures(_sample(device), _children(device.pid))


def _figures(samples: list[dict[str, int]], children: int) -> Iterator[Figure]:
    private = median(sample["RssAnon"] for sample in samples) / 1024
    total = median(sum(sample.values()) for sample in samples) / 1024
    yield Figure("idle", round(total, 1), "MiB", GOAL_MIB, {"children": children, "samples": len(samples)})
    yield Figure("idle-private", round(private, 1), "MiB")


def _sample(device: subprocess.Popen[bytes]) -> list[dict[str, int]]:
    samples = []
    for _ in range(_SAMPLES):
        samples.append(resident_kb(Path(f"/proc/{device.pid}/status").read_text(encoding="utf-8")))
        time.sleep(0.1)
    return samples


def _children(pid: int) -> int:
    """Processes that the device holds while it waits; none are expected."""
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split())


def _configure(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for key, value in _CONFIG.items():
        # The first one: tables that come later have keys of the same name.
        text, found = re.subn(rf"(?m)^{key} = \S+", f"{key} = {value}", text, count=1)
        if not found:
            raise click.ClickException(f"idle: the sample config has no line for {key}")
    path.write_text(text, encoding="utf-8")


def _run(*arguments: object) -> str:
    done = subprocess.run([*_COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"idle: {arguments[0]} {arguments[1]} failed: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def _running(log: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen([*_COMMAND, *map(str, arguments)], stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            raise click.ClickException(f"idle: not ready in time: {log.read_text(encoding='utf-8')[-500:]}")
        time.sleep(0.1)


def _events(log: Path) -> set[str]:
    return {json.loads(line)["event"] for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")}
