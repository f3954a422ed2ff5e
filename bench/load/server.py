"""The aggregator under load: a process of its own, started as an operator does, watched through ``/proc``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.errors import UnavailableError
from bench.idle import resident_kb
from cloud.config import CONFIG_NAME, Config, load_config
from cloud.init import init_folder
from cloud.operator import URL_NAME
from edge_runtime.bundle import Bundle

TASK = "load"
_PATIENCE_S = 60.0
_TICKS_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Task:
    """What the aggregator is asked for: so many rounds, in each of which so many devices answer."""

    rounds: int
    devices: int


@dataclass(frozen=True)
class Served:
    """A running aggregator."""

    url: str
    config: Config
    pid: int

    def cpu_s(self) -> float:
        """Seconds that its threads have had a processor, user and system together."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_S

    def private_mb(self) -> float:
        """Memory of its own, in MiB: all that is no file's."""
        return resident_kb(Path(f"/proc/{self.pid}/status").read_text())["RssAnon"] / 1024


@contextmanager
def serving(folder: Path, bundle: Bundle, task: Task) -> Iterator[Served]:
    """Run an aggregator on a new folder until the block ends.

    Raises:
        UnavailableError: it did not listen in time, or this system has no /proc.
    """
    if not Path("/proc/self/status").exists():
        raise UnavailableError("load: needs /proc, which this system does not have")
    config = _configured(folder / "site", bundle, task)
    command = [sys.executable, "-m", "edge_runtime.cli", "cloud", "serve", "--config", str(config.folder), "--json"]
    log = folder / "server.log"
    with (folder / "events.jsonl").open("w") as events, log.open("w") as errors:
        process = subprocess.Popen(command, stdout=events, stderr=errors)
    try:
        address = config.data_path / URL_NAME
        end = time.monotonic() + _PATIENCE_S
        while not address.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise UnavailableError(f"load: the aggregator did not listen: {log.read_text()[-500:]}")
            time.sleep(0.05)
        yield Served(address.read_text().strip(), config, process.pid)
    finally:
        process.terminate()
        process.wait(_PATIENCE_S)


def _configured(site: Path, bundle: Bundle, task: Task) -> Config:
    init_folder(site, bundle=bundle.folder, task=TASK, force=False)
    tables: dict[str, dict[str, object]] = {
        "task": {
            "name": TASK,
            "bundle": str(bundle.folder.resolve()),
            "policy": "fixed",
            "aggregation": "b-only",  # so that all rounds are alike
            "rounds": task.rounds,
            "devices_per_round": task.devices,
            "min_devices": task.devices,
            "round_deadline_s": 86_400.0,
        },
        "server": {"port": 0},
    }
    text = "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for name, keys in tables.items()
    )
    path = site / CONFIG_NAME
    path.write_text(text)
    return load_config(path)
