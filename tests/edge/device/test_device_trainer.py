"""The training child: its events arrive, its failures are told apart, and it never outlives its reason."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import msgspec
import pytest
from device_bench import Bench
from device_standin import WEIGHT

from edge_runtime.bundle import MANIFEST_NAME
from edge_runtime.device.artifacts import Request
from edge_runtime.device.errors import TrainingError, TrainingInputError
from edge_runtime.device.inspector import ChildInspector
from edge_runtime.device.trainer import ChildTrainer
from edge_runtime.training.job import FRAME_NAME, Event, Notice, Stepped, TrainingJob

STANDIN = (sys.executable, str(Path(__file__).with_name("device_standin.py")))


@pytest.fixture
async def job(bench: Bench, tmp_path: Path) -> TrainingJob:
    """A real job of round 0, caught on its way to the trainer."""
    caught: list[TrainingJob] = []

    def stop(made: TrainingJob) -> None:
        caught.append(made)
        raise TrainingError("caught")

    bench.trainer.before = stop
    with pytest.raises(TrainingError, match="caught"):
        await bench.run()
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    return TrainingJob(
        **{**{f: getattr(caught[0], f) for f in caught[0].__struct_fields__}, "data": (str(data),), "out": str(out)}
    )


def behave(job: TrainingJob, how: str) -> Path:
    path = Path(job.data[0])
    path.write_text(how)
    return path


async def test_events_arrive_and_the_frame_lies_in_its_folder(job: TrainingJob) -> None:
    behave(job, "well")
    events: list[Event] = []
    done = await ChildTrainer(STANDIN).train(job, events.append)
    assert done.weight == WEIGHT
    assert events == [Notice("two texts were cut"), *(Stepped(step, 3, 2.0 / step) for step in (1, 2, 3))]
    assert (Path(job.out) / FRAME_NAME).exists()


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("bad line", TrainingInputError, "line 3: no text$"),
        ("broken", TrainingError, "^EngineError: no graph$"),
        ("crash", TrainingError, "^training: the process ended with code 3: out of luck$"),
        ("junk", TrainingError, "no event: 'hello'"),
        ("long line", TrainingError, "too long to be an event"),
    ],
)
async def test_failures_are_told_apart(job: TrainingJob, how: str, error: type[Exception], message: str) -> None:
    behave(job, how)
    with pytest.raises(error, match=message) as raised:
        await ChildTrainer(STANDIN).train(job, lambda _: None)
    assert type(raised.value) is error


async def test_a_child_that_cannot_start_training_is_a_clear_line(job: TrainingJob) -> None:
    with pytest.raises(TrainingError, match=r"ended with code 1: .*No module named 'nothing'"):
        await ChildTrainer((sys.executable, "-m", "nothing.here")).train(job, lambda _: None)


@pytest.mark.parametrize(("how", "grace_s"), [("hang", 5.0), ("stubborn", 0.2)])
async def test_cancelling_ends_the_child(
    job: TrainingJob, how: str, grace_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_runtime.device.child._TERMINATE_S", grace_s)
    pid_file = behave(job, how).with_name("pid")
    training = asyncio.ensure_future(ChildTrainer(STANDIN).train(job, lambda _: None))
    while not (pid_file.exists() and pid_file.read_text()):
        await asyncio.sleep(0.01)
    began = time.monotonic()
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    assert time.monotonic() - began < 3
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


async def test_the_inspector_child_answers_as_the_function_does(bench: Bench, tmp_path: Path) -> None:
    await bench.run(once=True)
    digest = bench.aggregator.bundle.digest
    folder = str(bench.home.bundle_path(digest))
    assert (await ChildInspector().ask(Request("bundle", folder, digest))).error == ""
    assert "not a bundle" in (await ChildInspector().ask(Request("bundle", str(tmp_path / "x"), digest))).error


def test_the_inspector_child_ends_with_its_parent(tmp_path: Path) -> None:
    """In the middle of its work, here of reading a file that does not come; so a killed device leaves nobody behind
    who writes into its home."""
    os.mkfifo(tmp_path / MANIFEST_NAME)
    request = msgspec.json.encode(Request("manifest", str(tmp_path), "ab" * 32))
    command = (sys.executable, "-m", "edge_runtime.device.artifacts")
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE) as child:
        assert child.stdin is not None, "a pipe was asked for"
        child.stdin.write(request + b"\n")
        child.stdin.flush()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1.0)
        child.stdin.close()  # as the system does it when the parent is gone
        assert child.wait(10.0) == 1


async def test_a_device_that_left_no_frame(bench: Bench) -> None:
    bench.trainer.before = lambda job: None

    async def train(job: TrainingJob, on_event: object) -> object:
        from edge_runtime.training.job import Done
        from edge_runtime.wire import LocalMetrics

        return Done(WEIGHT, LocalMetrics())

    bench.trainer.train = train  # type: ignore[method-assign,assignment]
    with pytest.raises(TrainingError, match="left no update"):
        await bench.run()
