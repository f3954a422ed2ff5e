"""A task's folder and the real processes that work on copies of it.

A folder is made once, with a tiny bundle, keys, a database, and two devices that have enrolled; scenarios copy it.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import multiprocessing
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

from edge_runtime.device.enrolment import enrol
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from edge_runtime.device.storage_key import KeyChoice, find_key
from edge_runtime.wire import Token
from tests.cloud.cloud_fleet import ROOT, Clock, Site, make_bundle
from tests.crash.child import WEIGHTS
from tests.crash.ledger import ROUNDS, WEIGHT_CAP
from tests.crash.points import Point
from tests.crash.process import run_edge

_PORTS = range(20_000, 30_000)  # the system gives none of these to a connection, so a killed server finds its own free
_CLI = (sys.executable, "-m", "edge_runtime.cli")
_TASK: dict[str, object] = {
    "rounds": ROUNDS,
    "devices_per_round": len(WEIGHTS),
    "min_devices": len(WEIGHTS),
    "round_deadline_s": 3600,
    "weight_cap": WEIGHT_CAP,
}


def make_task(folder: Path) -> Path:
    """What all scenarios begin with, in ``folder``."""
    folder.mkdir(exist_ok=True)
    asyncio.run(_make_task(folder))
    return folder


async def _make_task(folder: Path) -> None:
    site = Site.make(folder, bundle=make_bundle(folder / "bundle", task="lm"), **_TASK)
    site.clock = Clock(time.time())
    server = await site.start()
    (folder / "data.jsonl").write_text('{"text": "not read"}\n')
    for name in WEIGHTS:
        token = Token.parse((await site.operator.make_token(name, 60)).token)
        await enrol(_home(folder / name), server=server.url, token=token, device=name, host=Host())
    await site.close()
    *_, last = WEIGHTS  # has the bundle; the others download it
    shutil.copytree(folder / "bundle", Home(folder / last).bundle_path(site.bundle.digest))


def free_port(rng: random.Random) -> int:
    """A port that nothing listens on."""
    while True:
        port = rng.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def point_homes_at(folder: Path, port: int) -> None:
    """Let the devices of a copied task look for the server there."""
    for name in WEIGHTS:
        home = _home(folder / name)
        home.save_identity(msgspec.structs.replace(home.identity(), server=f"http://127.0.0.1:{port}"))


def _home(folder: Path) -> Home:
    """A device's home with its storage key, which copies of the task share."""
    return Home(folder, find_key(Home(folder), KeyChoice()))


class ServerProcess:
    """``emberlora cloud serve`` on a copied task."""

    def __init__(self, folder: Path, port: int, point: Point | None = None, nth: int = 0) -> None:
        command = _CLI if point is None else (sys.executable, "-m", "tests.crash.process", point.name, str(nth))
        options = ("--config", str(folder / "site"), "--port", str(port), "--json")
        self._port = port
        self._log = folder / "server.log"
        self._from = self._log.stat().st_size if self._log.exists() else 0
        self.began = time.monotonic()
        with self._log.open("ab") as log, (folder / "server.err").open("ab") as errors:
            self._process = subprocess.Popen(
                (*command, "cloud", "serve", *options), stdin=subprocess.DEVNULL, stdout=log, stderr=errors, cwd=ROOT
            )

    @property
    def code(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.poll()

    @property
    def age_s(self) -> float:
        """Seconds since it was started, without those in which others had the processors that it wanted (Linux)."""
        schedule = Path(f"/proc/{self._process.pid}/schedstat")
        waited_ns = int(schedule.read_text().split()[1]) if schedule.exists() else 0
        return time.monotonic() - self.began - waited_ns / 1e9

    def answers(self) -> bool:
        """Whether it answers a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/v1/nothing")
            return connection.getresponse().status == 404
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def started(self) -> dict[str, Any] | None:
        """What it says when it has started, once it has."""
        with self._log.open() as log:
            log.seek(self._from)
            lines = [json.loads(line) for line in log if line.endswith("\n")]
        return next((line for line in lines if line["event"] == "server-started"), None)

    def kill(self) -> None:
        """``kill -9``."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """End it in good order; its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(30)


class DeviceProcess:
    """``emberlora edge run`` on a home of a copied task, forked from a process that has imported all of it.

    Args:
        folder: The copied task.
        name: The device's.
        point: Where it dies, at the ``nth`` time; None: it does not.
        silence_s: After so many seconds without a byte it takes a connection for dead; None: a minute, as all do.
    """

    def __init__(
        self, folder: Path, name: str, point: Point | None = None, nth: int = 0, *, silence_s: float | None = None
    ) -> None:
        arguments = ["--home", str(folder / name), "--data", str(folder / "data.jsonl"), "--json"]
        index = list(WEIGHTS).index(name)
        self.began = time.monotonic()
        self._process = _FORKSERVER.Process(
            target=run_edge,
            args=(index, arguments, folder),
            kwargs={"point": point, "nth": nth, "silence_s": silence_s},
            daemon=True,
        )
        self._process.start()

    @property
    def code(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.exitcode

    def kill(self) -> None:
        """``kill -9``; its training child is not asked."""
        self._process.kill()
        self._process.join()


_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(
    ["tests.crash.process", "edge_runtime.device.commands", "edge_runtime.device.running"]
)


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that were given this folder and still run."""
    running = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]
    return [" ".join(line) for line in running if any(Path(part).is_relative_to(folder) for part in line)]
