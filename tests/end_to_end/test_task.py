"""A whole task by its commands: real processes, real training, HTTP on loopback, and ``kill -9`` on both sides."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.bundle import map_tensors, open_bundle

LABELS = ("asyncio", "email", "tkinter", "xml")
ROUNDS = 3
COMMAND = [sys.executable, "-m", "edge_runtime.cli"]


def emberlora(*arguments: object, told: str = "") -> str:
    """What a command printed; ``told`` is its standard input."""
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, input=told)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_data(path: Path, *, seed: int, count: int) -> Path:
    """Labels are told by their words; every device has another mix."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet([3.0] * len(LABELS))
    with path.open("w") as file:
        for label in rng.choice(len(LABELS), size=count, p=shares):
            words = " ".join(f"word{int(label) * 10 + int(word)}" for word in rng.integers(0, 10, size=6))
            file.write(json.dumps({"text": words, "label": LABELS[label]}) + "\n")
    return path


@contextmanager
def running(*arguments: object, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the background; it is killed at the end if it still runs."""
    with (
        log.open("ab") as file,
        subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=file, stderr=file) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool], *, what: str, logs: Path, timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            said = "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(logs.glob("*.log")))
            pytest.fail(f"{what}: not within {timeout_s} s\n{said}")
        time.sleep(0.1)


class Site:
    """An aggregator's folder and two enrolled devices' homes."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder = folder
        self.config = folder / "server" / "emberlora.toml"
        self.tokens: list[str] = []  # used ones
        emberlora("cloud", "init", folder / "server", "--bundle", bundle, "--task", "words")
        text = self.config.read_text()
        changes = {"rounds": ROUNDS, "devices_per_round": 2, "rank": 3, "max_tokens": 16, "port": 0}
        changes |= {"lr_a": 1e-2, "lr_b": 1e-2, "lr_head": 1e-2}
        for key, value in changes.items():
            text, found = re.subn(rf"(?m)^{key} = \S+", f"{key} = {value}", text)
            assert found == 1, key
        text = text.replace("epochs = 1 ", "steps = 30 ")
        self.config.write_text(text)

    def url(self) -> str:
        return (self.folder / "server" / "data" / "server.url").read_text().strip()

    def status(self) -> dict[str, Any]:
        return json.loads(emberlora("cloud", "status", "--config", self.config, "--json"))

    def serve(self) -> Any:
        return running("cloud", "serve", "--config", self.config, log=self.folder / "server.log")

    def wait_until_serving(self) -> None:
        url = self.folder / "server" / "data" / "server.url"
        wait_for(url.exists, what="the server's address", logs=self.folder)

    def enroll(self, name: str) -> None:
        token = emberlora("cloud", "token", "--config", self.config, "--device", name).strip()
        common = ("--home", self.folder / name, "--data", self.folder / f"{name}.jsonl", "--eval", self.held_out)
        emberlora("edge", "enroll", "--server", self.url(), "--token", "-", "--name", name, *common, told=token)
        self.tokens.append(token)

    @property
    def held_out(self) -> Path:
        return self.folder / "held-out.jsonl"

    def run(self, name: str) -> Any:
        arguments = ("edge", "run", "--home", self.folder / name, "--threads", 1, "--json")
        return running(*arguments, log=self.folder / f"{name}.log")

    def events(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"{name}.log").read_text().splitlines() if line[:1] == "{"]


def bert_site(folder: Path, bundle: Path) -> Site:
    """With the data of two devices in ``folder``."""
    for seed, name in enumerate(("one", "two")):
        write_data(folder / f"{name}.jsonl", seed=seed, count=60 + 20 * seed)
    write_data(folder / "held-out.jsonl", seed=9, count=40)
    return Site(folder, bundle)


@pytest.fixture
def site(bert_bundle: Path, tmp_path: Path) -> Site:
    return bert_site(tmp_path, bert_bundle)


@pytest.mark.slow
def test_a_task_survives_kills_on_both_sides(site: Site, bert_folder: Path) -> None:
    """The aggregator is killed after the first round, a device in the middle of training; the task ends the same way.

    Every device receives the same last adapter, each counts once in every round, the devices' evaluation agrees with
    transformers + peft, and something was learned.
    """
    with ExitStack() as stack:
        server = stack.enter_context(site.serve())
        site.wait_until_serving()
        address = site.url()
        for name in ("one", "two"):
            site.enroll(name)
        first = stack.enter_context(site.run("one"))
        second = stack.enter_context(site.run("two"))
        wait_for(lambda: site.status()["round"] >= 1, what="the first round", logs=site.folder)
        server.kill()
        first.kill()
        port = address.rsplit(":", 1)[1]
        site.config.write_text(site.config.read_text().replace("port = 0", f"port = {port}"))
        stack.enter_context(site.serve())
        first = stack.enter_context(site.run("one"))
        wait_for(lambda: None not in (first.poll(), second.poll()), what="both devices' end", logs=site.folder)
        assert (first.returncode, second.returncode) == (0, 0)
        status = site.status()

    assert status["state"] == "finished"
    assert [(entry["round"], entry["devices"], entry["weight"]) for entry in status["history"]] == [
        (round_, 2, 140) for round_ in range(ROUNDS)
    ]
    for name in ("one", "two"):
        uploaded = [event["round"] for event in site.events(name) if event["event"] == "uploaded"]
        assert len(uploaded) == len(set(uploaded))
        assert status["devices"][("one", "two").index(name)]["updates"] == ROUNDS

    folders = [site.folder / name / "published" for name in ("one", "two")]
    one, two, cloud = (
        map_tensors(folder / "adapter_model.safetensors")
        for folder in [*folders, site.folder / "server" / "data" / "published"]
    )
    for name, array in cloud.items():
        np.testing.assert_array_equal(one[name], array)
        np.testing.assert_array_equal(two[name], array)

    measured = json.loads(
        emberlora("edge", "eval", "--home", site.folder / "one", "--data", site.held_out, "--max-tokens", 16, "--json")
    )
    judged = json.loads(
        emberlora("peft-eval", "--model", bert_folder, "--adapter", folders[0], "--data", site.held_out, "--json")
    )
    assert measured["value"] == pytest.approx(judged["value"], abs=1e-9)
    assert measured["loss"] == pytest.approx(judged["loss"], rel=1e-4)
    assert measured["value"] > status["history"][0]["metric"] + 0.2
    assert open_bundle(site.folder / "one" / "bundles" / status_bundle(site)).manifest.labels == LABELS


@pytest.mark.slow
def test_a_task_that_begins_with_class_means(site: Site) -> None:
    """Two devices measure, the head classifies before anything is trained and stays frozen; all of them tell so."""
    text = site.config.read_text()
    text = text.replace('head_init = "bundle"', 'head_init = "class-means"').replace(
        'head = "trained"', 'head = "frozen"'
    )
    site.config.write_text(text.replace(f"rounds = {ROUNDS}", "rounds = 1"))
    with ExitStack() as stack:
        stack.enter_context(site.serve())
        site.wait_until_serving()
        for name in ("one", "two"):
            site.enroll(name)
        devices = [stack.enter_context(site.run(name)) for name in ("one", "two")]
        wait_for(lambda: all(d.poll() is not None for d in devices), what="both devices' end", logs=site.folder)
        assert [device.returncode for device in devices] == [0, 0]
        status = site.status()
    assert [(entry["state"], entry["weight"]) for entry in status["history"]] == [("measure", 2), ("train", 140)]
    assert status["history"][0]["loss_start"] is None
    before, after = (entry["metric"] for entry in status["history"])
    assert before < 0.6
    assert after > 0.8  # of the adapter that round 1 started from: the head alone
    events = site.events("one")
    assert [event["state"] for event in events if event["event"] == "plan"] == ["measure", "train", "finished"]
    assert [(event["examples"], event["of"]) for event in events if event["event"] == "measured"][-1] == (60, 60)
    assert not [event for event in events if event["event"] == "plan" and event["head_alive"]]


@pytest.mark.slow
def test_a_stopped_device_goes_on_where_it_was(site: Site) -> None:
    """SIGTERM in the middle of a round: the next process takes the steps that are left, and no step is taken twice."""
    steps = 150
    text = site.config.read_text().replace("steps = 30 ", f"steps = {steps} ")
    site.config.write_text(text.replace(f"rounds = {ROUNDS}", "rounds = 1"))

    def done(name: str) -> list[int]:
        """Some line may be half written."""
        lines = (site.folder / f"{name}.log").read_bytes().split(b"\n")[:-1]
        events = (json.loads(line) for line in lines if line.startswith(b"{"))
        return [event["step"] for event in events if event["event"] == "step"]

    with ExitStack() as stack:
        stack.enter_context(site.serve())
        site.wait_until_serving()
        for name in ("one", "two"):
            site.enroll(name)
        first = stack.enter_context(site.run("one"))
        wait_for(lambda: len(done("one")) >= 20, what="some steps", logs=site.folder)
        first.terminate()
        assert first.wait(timeout=60) == 143
        before = done("one")
        assert (site.folder / "one" / "checkpoint.encrypted").exists()
        devices = [stack.enter_context(site.run(name)) for name in ("one", "two")]
        wait_for(lambda: all(d.poll() is not None for d in devices), what="both devices' end", logs=site.folder)
        assert [device.returncode for device in devices] == [0, 0]
    assert len(before) < steps, "it was to be stopped in the middle"
    (resumed,) = (event for event in site.events("one") if event["event"] == "resumed")
    assert resumed["steps"] == steps
    assert resumed["step"] >= before[-1]  # a device that is stopping reads its child no longer
    assert done("one") == [*before, *range(resumed["step"] + 1, steps + 1)]
    assert not (site.folder / "one" / "checkpoint.encrypted").exists()


@pytest.mark.slow
def test_a_pilot_with_real_devices(site: Site, tmp_path: Path) -> None:
    """Two devices measure themselves and train; the pilot knows their speed, memory and what was learned."""
    with ExitStack() as stack:
        stack.enter_context(site.serve())
        site.wait_until_serving()
        for name in ("one", "two"):
            site.enroll(name)
        told = [
            json.loads(line) for line in emberlora("cloud", "devices", "--config", site.config, "--json").splitlines()
        ]
        assert [device["capability"]["calibration_s"] > 0 for device in told] == [True, True]
        devices = [stack.enter_context(site.run(name)) for name in ("one", "two")]
        wait_for(lambda: all(d.poll() is not None for d in devices), what="both devices' end", logs=site.folder)
        page = tmp_path / "pilot.html"
        options = ("--config", site.config, "--devices", 20, "--html", page)
        found = json.loads(emberlora("cloud", "pilot", *options, "--json"))  # ends with 0: go
    assert found["go"]
    passed = {reason["about"]: reason["passed"] for reason in found["reasons"]}
    assert passed["learning"] is True
    assert passed["memory"] is True
    for device, seen in zip(found["devices"], told, strict=True):
        assert device["counted"] == ROUNDS
        assert 0 < device["step_s"] < device["train_s"] < device["answer_s"]
        assert 0 < device["peak_mb"] < device["available_mb"] <= seen["capability"]["memory_mb"]
        assert device["round_trip_s"] > 0
        assert device["grades"]["memory"] == "A"
    assert found["suggestion"]["devices_per_round"] == 16
    assert "one" in page.read_text()


def status_bundle(site: Site) -> str:
    """The only bundle in the first device's home."""
    (folder,) = (site.folder / "one" / "bundles").iterdir()
    return folder.name
