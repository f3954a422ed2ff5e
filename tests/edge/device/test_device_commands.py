"""The commands as a user types them: what they print, what they refuse, how they end."""

from __future__ import annotations

import asyncio
import functools
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from device_bench import FakeTrainer, InProcessInspector
from device_bundle import TinyBundle
from device_server import Aggregator, Serving

from edge_runtime import wire
from edge_runtime.device import commands, inspector, trainer, trial
from edge_runtime.device.commands import enroll, leave, run, status
from edge_runtime.device.display import TerminalDisplay
from edge_runtime.device.events import MeasuredPart, ModulesStilled, Noticed, Planned, TrainedRound, Uploaded
from edge_runtime.device.home import Home, default_home
from edge_runtime.device.storage_key import default_file
from edge_runtime.device.trial import try_engine
from edge_runtime.training.job import TrainingJob

STANDIN = (sys.executable, str(Path(__file__).with_name("device_standin.py")))


class Threaded:
    """The aggregator in a thread of its own, so that commands may run a loop in this one."""

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator = aggregator
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        async with Serving(self.aggregator):
            self._ready.set()
            await self._stop.wait()

    def __enter__(self) -> Aggregator:
        self._thread.start()
        self._ready.wait(5)
        return self.aggregator

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)
        self._loop.close()


class User:
    """Types commands on one home."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def types(self, command: object, *options: object, stdin: str | None = None, **environ: str) -> Result:
        environ = {"EMBERLORA_HOME": str(self.home), **environ}
        return CliRunner().invoke(command, [str(option) for option in options], input=stdin, env=environ)  # type: ignore[arg-type]


@pytest.fixture
def server(tiny_bundle: TinyBundle) -> Iterator[Aggregator]:
    with Threaded(Aggregator(tiny_bundle, rounds=1)) as aggregator:
        yield aggregator


def behave(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """What the child that tries ONNX Runtime does instead."""
    monkeypatch.setattr(trial, "try_engine", functools.partial(try_engine, (sys.executable, "-c", code)))


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    monkeypatch.setattr(trainer, "ChildTrainer", functools.partial(trainer.ChildTrainer, STANDIN))
    monkeypatch.setattr(inspector, "ChildInspector", InProcessInspector)
    behave(monkeypatch, "")
    return User(tmp_path / "home")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("well")
    return path


@pytest.fixture
def enrolled(user: User, server: Aggregator, data: Path) -> User:
    token = str(server.token("pi-1"))
    result = user.types(enroll, "--server", server.url, "--token", token, "--name", "pi-1", "--data", data)
    assert (result.exit_code, result.stdout) == (0, "pi-1 is enrolled in task docs; next: emberlora edge run\n")
    key = default_file(user.home)
    assert result.stderr == f"its folder is encrypted; without the storage key it is lost: file {key}\n"
    return user


def fails(result: Result, code: int, *parts: str) -> None:
    """One line on standard error, nothing on standard output, this exit code."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ")
    assert all(part in lines[-1] for part in parts), lines[-1]
    assert len(lines) == 1 or lines[0].startswith("Usage:")


def test_a_task_for_a_person(enrolled: User) -> None:
    result = enrolled.types(run)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("pi-1 takes part in task docs at http://127.0.0.1:")
    assert "two texts were cut" in lines
    assert any(line.startswith("round 1 of 1: update sent, ") and "loss 2.000 → 1.000" in line for line in lines)
    assert lines[-1].startswith("the task is finished (")
    assert result.stdout.count("round 1 of 1: update sent") == 1
    assert "round 2" not in result.stdout


def test_a_task_for_a_machine(enrolled: User, data: Path) -> None:
    result = enrolled.types(run, "--json", "--threads", 2)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    uploaded = next(event for event in events if event["event"] == "uploaded")
    assert uploaded == {"event": "uploaded", "round": 0, "bytes": uploaded["bytes"], "weight": 5}
    assert events[-1]["event"] == "finished"
    data.unlink()  # a finished device needs none
    again = enrolled.types(run, "--json")
    assert (again.exit_code, json.loads(again.stdout.splitlines()[-1])) == (0, events[-1])


def test_what_the_user_decides_about_training_reaches_it(enrolled: User, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[TrainingJob] = []
    monkeypatch.setattr(trainer, "ChildTrainer", lambda: FakeTrainer(before=jobs.append))
    options = (
        "--threads",
        2,
        "--memory-mb",
        300,
        "--micro-tokens",
        512,
        "--remember-mb",
        0,
        "--skip-bad-lines",
        "--packed-weights",
    )
    assert enrolled.types(run, *options).exit_code == 0
    (job,) = jobs
    assert job.packed_weights
    assert (job.threads, job.memory_budget_mb, job.micro_tokens, job.remember_mb, job.skip_bad) == (
        2,
        300,
        512,
        0,
        True,
    )


@pytest.mark.parametrize(("options", "tier"), [((), 0), (("--memory-mb", 300), 1), (("--tier", 2), 2)])
def test_a_weak_device_carries_less(
    enrolled: User, server: Aggregator, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], tier: int
) -> None:
    """What it may plan with says which tier is meant for it; its user may want a weaker one."""
    jobs: list[TrainingJob] = []
    monkeypatch.setattr(trainer, "ChildTrainer", lambda: FakeTrainer(before=jobs.append))
    tiers = (wire.Tier(0, max_rank=2, memory_mib=512), wire.Tier(1, max_rank=2))
    server.plans[-1] = wire.sign_plan(msgspec.structs.replace(server.plans[-1].plan, tiers=tiers), server.key)
    result = enrolled.types(run, *options)
    assert result.exit_code == 0
    assert [job.tier for job in jobs] == [tier]
    assert (f"tier {tier}" in result.stdout) == bool(tier)


def test_a_notice_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    display = TerminalDisplay()
    for text in ("60 examples", "60 examples", "3 were cut"):
        display.show(Noticed(text))
    display.close()
    assert capsys.readouterr().out == "60 examples\n3 were cut\n"


def test_a_round_that_measures_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """One line when it begins and one when it is sent, without steps or losses."""
    display = TerminalDisplay()
    for event in (
        Planned(0, 13, "measure", "d" * 64, 0, 72, False, 10),
        MeasuredPart(0, 32, 40),
        TrainedRound(0, 40, 0, None, None, 2.5, None, None),
        Uploaded(0, 1500, 1),
        Planned(1, 13, "train", "d" * 64, 36, 72, True, 10),
        ModulesStilled(1, 4, ("layer.0.query",)),
        TrainedRound(1, 40, 6, 2.0, 1.0, 2.5, None, None, skipped=2),
        Uploaded(1, 1500, 40),
    ):
        display.show(event)
    display.close()
    assert capsys.readouterr().out.splitlines() == [
        "round 1 of 13: measuring class means",
        "round 1 of 13: update sent, 1.5 kB, weight 1 · class means measured in 2.5 s",
        "round 2 of 13: update sent, 1.5 kB, weight 40 · loss 2.000 → 1.000 · 6 steps in 2.5 s · "
        "2 steps of still modules left out",
    ]


def test_status_before_and_after(enrolled: User, data: Path) -> None:
    before = json.loads(enrolled.types(status, "--json").stdout)
    assert (before["device"], before["done_round"], before["finished"]) == ("pi-1", -1, False)
    assert before["data"] == [str(data)]
    enrolled.types(run)
    after = json.loads(enrolled.types(status, "--json").stdout)
    assert (after["done_round"], after["updates_counted"], after["finished"]) == (0, 1, True)
    assert (Path(after["published"]) / "adapter_config.json").exists()
    text = enrolled.types(status).stdout
    assert "state       finished" in text
    assert "updates     1 counted" in text


def test_leaving(enrolled: User, server: Aggregator) -> None:
    result = enrolled.types(leave)
    assert (result.exit_code, result.output) == (0, "pi-1 has left task docs\n")
    assert server.devices == {}
    fails(enrolled.types(leave), 2, "not enrolled")


def test_a_forgotten_device_is_told_what_to_do(enrolled: User, server: Aggregator) -> None:
    server.devices.clear()
    result = enrolled.types(run, "--json")
    assert result.exit_code == 1
    assert "has left: run 'emberlora edge leave'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_revoked_device_says_so_once_and_may_leave(enrolled: User, server: Aggregator) -> None:
    server.revoked.add("pi-1")
    result = enrolled.types(run, "--json")
    assert result.exit_code == 1
    assert "was revoked by the operator: its key is refused for good, and nothing is tried again" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert enrolled.types(leave).exit_code == 0


def test_the_token_may_come_by_standard_input_or_environment(user: User, server: Aggregator, tmp_path: Path) -> None:
    token = str(server.token("pi-1"))
    result = user.types(enroll, "--server", server.url, "--token", "-", "--name", "pi-1", stdin=token + "\n")
    assert result.exit_code == 0
    other = User(tmp_path / "other")
    token = str(server.token("pi-2"))
    result = other.types(enroll, "--server", server.url, "--name", "pi-2", EMBERLORA_TOKEN=token)
    assert result.exit_code == 0
    assert token not in result.output


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"--token": "ember1.short"}, 2, "not an EmberLoRA token"),
        ({"--name": "Pi 1"}, 2, "expected 1 to 63 lower-case letters"),
        ({"--name": "operator"}, 2, "the operator's"),
        ({"--server": "http://198.51.100.1:8440"}, 2, "plain http leaves this machine"),
        ({"--server": "http://127.0.0.1:9"}, 1, "cannot be reached"),
        ({"--data": "nowhere.jsonl"}, 2, "does not exist"),
    ],
)
def test_wrong_enrolments(user: User, server: Aggregator, options: dict[str, str], code: int, message: str) -> None:
    token = str(server.token("pi-1"))
    given = {"--server": server.url, "--token": token, "--name": "pi-1", **options}
    result = user.types(enroll, *(part for pair in given.items() for part in pair))
    fails(result, code, message)
    assert token not in result.output


def test_where_the_engine_crashes_nothing_is_enrolled(
    user: User, server: Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    behave(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    token = server.token("pi-1")
    result = user.types(enroll, "--server", server.url, "--token", token, "--name", "pi-1")
    fails(result, 1, "onnxruntime ", "was ended by SIGILL; nothing was enrolled; ")
    assert not user.home.exists()
    assert server.devices == {}
    behave(monkeypatch, "")
    again = user.types(enroll, "--server", server.url, "--token", token, "--name", "pi-1")
    assert again.exit_code == 0, "the token was used up"


def test_a_used_token_is_a_refusal(enrolled: User, server: Aggregator, tmp_path: Path) -> None:
    (secret,) = server.tokens
    from edge_runtime.wire import Token

    thief = User(tmp_path / "thief")
    token = str(Token(secret, server.token("pi-1").fingerprint))
    fails(thief.types(enroll, "--server", server.url, "--token", token, "--name", "pi-1"), 1, "token")


def test_enrolling_twice(enrolled: User, server: Aggregator) -> None:
    token = str(server.token("pi-1"))
    result = enrolled.types(enroll, "--server", server.url, "--token", token, "--name", "pi-1")
    fails(result, 2, "already enrolled as pi-1", "emberlora edge leave")


def test_a_home_that_is_none_is_not_made(user: User) -> None:
    for command in (run, status, leave):
        fails(user.types(command), 2, "not enrolled", "emberlora edge enroll")
    assert not user.home.exists()


def test_running_without_data(user: User, server: Aggregator, data: Path) -> None:
    user.types(enroll, "--server", server.url, "--token", server.token("pi-1"), "--name", "pi-1")
    fails(user.types(run, "--json"), 2, "no training data: pass --data FILE")
    data.write_text("bad line")
    result = user.types(run, "--json", "--data", data)
    assert (result.exit_code, result.stderr) == (2, f"Error: {data}: line 3: no text\n")
    data.unlink()
    fails(user.types(run, "--json"), 2, f"{data}: no such file")


def test_a_home_in_use(enrolled: User) -> None:
    with Home(enrolled.home).locked():
        fails(enrolled.types(run, "--json"), 1, "another 'emberlora edge' process works on this home")
        assert enrolled.types(status).exit_code == 0


def test_a_damaged_home(enrolled: User) -> None:
    (enrolled.home / "state.json").write_text("{")
    for command in (run, status):
        fails(enrolled.types(command), 1, "state.json: damaged")


def test_training_that_breaks(enrolled: User, data: Path) -> None:
    data.write_text("crash")
    result = enrolled.types(run, "--json")
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: training: the process ended with code 3: out of luck\n",
    )


@pytest.mark.parametrize("command", [enroll, run, status, leave])
def test_help_teaches_with_an_example(user: User, command: object) -> None:
    result = user.types(command, "--help")
    assert result.exit_code == 0
    assert "Example:\n    emberlora" in result.stdout


def test_where_a_device_lives_by_default() -> None:
    home = Path.home()
    assert default_home({}, "linux") == home / ".local" / "share" / "emberlora"
    assert default_home({"XDG_DATA_HOME": "/data"}, "linux") == Path("/data/emberlora")
    assert default_home({"XDG_DATA_HOME": "data"}, "linux") == home / ".local" / "share" / "emberlora"
    assert default_home({}, "darwin") == home / "Library" / "Application Support" / "emberlora"


def test_the_edge_group_finds_the_commands() -> None:
    from edge_runtime.cli import main

    result = CliRunner().invoke(main, ["edge", "status", "--help"])
    assert "Asks nobody" in result.stdout
    assert commands.run.name == "run"


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    from edge_runtime.cli import main

    assert CliRunner().invoke(main, ["--version"]).stdout == f"emberlora, version {version('emberlora')}\n"
