"""The federated part: one aggregator and its devices, each a process, watched until the task is finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from rich.progress import Progress

from cloud.demo.errors import CommandFailedError
from cloud.demo.folder import DemoFolder, device_names
from cloud.demo.processes import Processes
from cloud.demo.progress import Live, Show
from cloud.demo.recipe import Recipe, config_text
from cloud.planlog import RoundLog

SERVER = "aggregator"
_SILENCE_S = 300.0  # longest time without any event before the demo gives up


@dataclass(frozen=True)
class Outcome:
    """What the aggregator knows at the end, what devices fetched in each round in bytes, and the log of its plans."""

    status: dict[str, Any]  # as `emberlora cloud status --json` prints it
    round_bytes_down: tuple[int, ...]
    plans: tuple[RoundLog, ...]


class Fleet:
    """Starts, watches and ends them."""

    def __init__(self, folder: DemoFolder, recipe: Recipe, processes: Processes) -> None:
        self._folder = folder
        self._recipe = recipe
        self._processes = processes
        self._devices = device_names(recipe)
        self._down = [0] * (recipe.rounds + 1)  # the last one: the published adapter

    def enrol(self) -> None:
        """Start the aggregator and make every device known to it."""
        folder, call = self._folder, self._processes.call
        call("cloud-init", "cloud", "init", folder.server, "--bundle", folder.bundle, "--task", "demo")
        config = config_text(self._recipe, bundle="../bundle")
        (folder.server / "emberlora.toml").write_text(config, encoding="utf-8")
        self._processes.start(SERVER, "cloud", "serve", "--config", folder.server, "--json")
        url = self._server_url()
        for device in self._devices:
            token = call("cloud-token", "cloud", "token", "--config", folder.server, "--device", device).strip()
            # On standard input: arguments stand in lists of processes.
            enroll = ("edge", "enroll", "--server", url, "--token", "-", "--name", device)
            data = ("--data", folder.texts(device, "train"), "--eval", folder.texts(device, "heldout"))
            call(f"{device}-enroll", *enroll, "--home", folder.home(device), *data, told=token)

    def run(self, show: Show) -> Outcome:
        """Let the devices train until the task is finished; returns when every device has the last adapter."""
        for device in self._devices:
            home = self._folder.home(device)
            self._processes.start(device, "edge", "run", "--home", home, "--threads", "1", "--json")
        live = Live(self._recipe)
        waiting = set(self._devices)
        with show.rounds(live) as bar:
            for event in self._processes.events(timeout_s=_SILENCE_S):
                if event.fields is None:
                    if event.source == SERVER:
                        raise CommandFailedError("the aggregator ended before the task was finished")
                    waiting.discard(event.source)
                else:
                    self._follow(event.source, event.fields, live, show)
                _update(bar, live)
                if not waiting:
                    break
        config = ("--config", self._folder.server)
        status = self._processes.call_json("cloud-status", "cloud", "status", *config)
        self._processes.call("cloud-adapter", "cloud", "adapter", *config, "--out", self._folder.adapter)
        self._processes.end(SERVER)
        plans = self._processes.call("cloud-plans", "cloud", "plans", *config, "--json").splitlines()
        return Outcome(status, tuple(self._down), tuple(msgspec.json.decode(line, type=RoundLog) for line in plans))

    def _server_url(self) -> str:
        for event in self._processes.events(timeout_s=60.0):
            if event.fields and event.fields.get("event") == "server-started":
                return str(event.fields["url"])
            if event.fields is None:
                break
        raise CommandFailedError("the aggregator ended before it listened")

    def _follow(self, source: str, fields: dict[str, Any], live: Live, show: Show) -> None:
        """Take one event of the aggregator or a device into account."""
        kind = fields.get("event")
        if kind == "step":
            live.steps += 1
            live.losses[source] = fields["loss"]
        elif kind == "fetched":
            self._down[min(fields["round"], self._recipe.rounds)] += fields["bytes"]
            live.bytes_down = sum(self._down)
        elif kind == "update-counted":
            live.round, live.received = fields["round"], fields["received"]
            live.bytes_up += fields["bytes"]
        elif kind == "round-applied":
            status = fields["status"]
            if status["metric"] is not None:
                live.curve.append(status["metric"])
            show.say(f"  {live.line()} at its start")
            live.round, live.received = status["round"] + 1, 0
        elif kind in ("waiting", "skipped", "request-refused", "work-failed"):
            show.say(f"  {source}: {kind}: {fields.get('detail', '')}")


def _update(bar: Progress, live: Live) -> None:
    task = bar.task_ids[0]
    bar.update(task, completed=live.steps, description=live.line())
