"""The real thing: ``edge run`` as a process with a training child, killed and stopped at named points."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import msgspec
import psutil
import pytest
from device_bench import Bench

from edge_runtime.device import commands
from edge_runtime.device.outbox import first_round
from edge_runtime.device.records import Settings
from edge_runtime.training.job import TrainingJob
from tests.edge.encrypted import VAULT

HERE = Path(__file__).parent
PATIENCE_S = 120  # for what takes a second or two; an emulated board needs a hundred times as long


@pytest.fixture
def data(bench: Bench, tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("well")
    bench.home.save_settings(Settings(data=(str(path),)))
    return path


async def start(bench: Bench, *options: str) -> Process:
    command = (sys.executable, "-W", "error", str(HERE / "device_process.py"), str(bench.home.folder), *options)
    return await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)


async def ended(process: Process) -> tuple[int, list[dict[str, object]], str]:
    """Exit code, events, standard error."""
    output, errors = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode is not None
    return process.returncode, [json.loads(line) for line in output.splitlines()], errors.decode()


async def until(condition: object, what: str) -> None:
    for _ in range(100 * PATIENCE_S):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"did not happen: {what}")


async def test_a_task_in_processes(bench: Bench, data: Path) -> None:
    bench.aggregator.rounds = 1
    code, events, errors = await ended(await start(bench))
    assert (code, errors) == (0, "")
    names = [event["event"] for event in events]
    one_round = ["plan", "fetched", "notice", "step", "step", "step", "trained", "uploaded"]
    assert names == ["started", *one_round, "plan", "fetched", "finished"]
    assert data.with_name("calls").read_text().splitlines() == ["well"]


async def test_kill_9_between_journal_and_upload(bench: Bench, data: Path) -> None:
    """The next process sends the very bytes of the first, and trains nothing again."""
    bench.aggregator.rounds = 1
    bench.aggregator.faults.away_for = {"PUT"}
    process = await start(bench)
    await until(lambda: (bench.home.outbox / "round-0.record").exists(), "the update is journaled")
    process.kill()
    await ended(process)
    sealed = bench.home.vault().read(bench.home.outbox / "round-0.sealed", "update")
    bench.aggregator.faults.away_for = set()
    code, events, _ = await ended(await start(bench))
    assert code == 0
    assert bench.aggregator.received[0] == (0, "pi-1", sealed)
    assert data.with_name("calls").read_text().splitlines() == ["well"]
    assert [event["round"] for event in events if event["event"] == "uploaded"] == [0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_signals_end_device_and_child(bench: Bench, data: Path, number: signal.Signals, code: int) -> None:
    data.write_text("hang")
    pid_file = data.with_name("pid")
    process = await start(bench)
    await until(lambda: pid_file.exists() and pid_file.read_text(), "the child trains")
    process.send_signal(number)
    got, events, errors = await ended(process)
    assert got == code
    assert events[-1] == {"event": "stopped", "signal": number.name}
    assert errors == "stopped; 'emberlora edge run' goes on where it was\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


async def test_a_waiting_device_stops_at_once(bench: Bench, data: Path) -> None:
    bench.aggregator.faults.away = True
    process = await start(bench)
    assert process.stdout is not None  # a pipe
    said = [json.loads(await asyncio.wait_for(process.stdout.readline(), PATIENCE_S))["event"] for _ in range(2)]
    assert said == ["started", "waiting"]
    process.terminate()
    code, events, _ = await ended(process)
    assert code == 143
    assert {event["event"] for event in events} <= {"waiting", "stopped"}
    assert events[-1]["event"] == "stopped"


@pytest.mark.not_emulated("the process's memory is the emulator's")
async def test_the_waiting_process_is_small(bench: Bench, data: Path) -> None:
    """After a whole round the resident process holds no numpy and no engine: 50 MB at most."""
    bench.aggregator.rounds, bench.aggregator.wanted = 5, 2  # round 0 stays open after this device's update
    process = await start(bench)
    await until(lambda: bench.home.state().counted == 1, "round 0 is done")
    await asyncio.sleep(0.2)
    used = psutil.Process(process.pid).memory_info().rss / 2**20
    process.terminate()
    await ended(process)
    assert first_round(bench.home.outbox) is None
    assert used < 50, used


def test_the_resident_modules_load_nothing_heavy() -> None:
    modules = [f"edge_runtime.device.{path.stem}" for path in Path(commands.__file__).parent.glob("*.py")]
    assert len(modules) > 10
    modules.append("edge_runtime.cli")
    heavy = {"numpy", "psutil", "google.protobuf", "onnxruntime", "tokenizers", "torch", "rich", "importlib.metadata"}
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}]; "
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # where nobody asks for the exit codes of orphans
    except psutil.NoSuchProcess:
        return True


async def test_kill_9_ends_the_training_child_too(tmp_path: Path) -> None:
    """It went on, with the memory of a training, beside the one of the device that was started next."""
    plan, job_file = tmp_path / "plan", tmp_path / "kept.json"
    os.mkfifo(plan)  # nobody writes it, so the child waits for ever
    (tmp_path / "out").mkdir()
    job = TrainingJob(
        str(plan), 0, "", "", "", data=(), evaluation=(), out=str(tmp_path / "out"), grant=VAULT.grant("frame")
    )
    job_file.write_bytes(msgspec.json.encode(job))
    code = (
        "import asyncio, msgspec, pathlib, sys\n"
        "from edge_runtime.device.trainer import ChildTrainer\n"
        "from edge_runtime.training.job import TrainingJob\n"
        "job = msgspec.json.decode(pathlib.Path(sys.argv[1]).read_bytes(), type=TrainingJob)\n"
        "asyncio.run(ChildTrainer().train(job, print))"
    )
    device = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(job_file))
    children: list[psutil.Process] = []
    await until(lambda: children.extend(psutil.Process(device.pid).children()) or children, "a child is started")
    try:
        await asyncio.sleep(0.5)  # into its work, as a rule; it must not matter
        device.kill()
        await device.wait()
        await until(lambda: has_ended(children[0]), "the child ends")
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            children[0].kill()
