"""A training that is interrupted ends as one that is not, and what cannot be used of a checkpoint is not used."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE

import msgspec
import numpy as np
import pytest

from edge_runtime.at_rest import StorageKey, WrongStorageKeyError
from edge_runtime.bundle import Array, Bundle, encode_tensors, open_bundle, parse_tensors
from edge_runtime.engine.interface import Score
from edge_runtime.training.checkpoint import Checkpoints, Position, StoppedError
from edge_runtime.training.job import (
    FRAME_NAME,
    Done,
    Evaluated,
    Event,
    Notice,
    Resumed,
    Stepped,
    Stilled,
    TrainingJob,
    decode_event,
)
from edge_runtime.training.round import run_round
from edge_runtime.training.session import WorkingBundle
from edge_runtime.training.stillness import Watched
from edge_runtime.wire import LocalMetrics, SignedPlan, decode_update
from edge_runtime.wire.update import Update
from tests.edge.encrypted import VAULT, vault_of
from tests.edge.held import run_held
from tests.edge.training.test_round import make_job, make_plan, write_data

CHILD = (sys.executable, "-m", "edge_runtime.training.child")


@pytest.fixture
def bundle(bert_bundle: Path) -> Bundle:
    return open_bundle(bert_bundle)


@dataclass
class Clock:
    """Seconds that pass when they are told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Said:
    """What a round says; it is interrupted after a step."""

    checkpoints: Checkpoints
    until: int | None = None
    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        # on_step is called before the checkpoint of the step, so the one that is asked for here is of this step.
        if isinstance(event, Stepped) and event.step == self.until:
            assert self.checkpoints.stop()

    def of(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


def checkpoints_of(job: TrainingJob) -> Checkpoints:
    return Checkpoints(Path(job.out) / "checkpoint", VAULT, job.round, every_s=1e9)


def update_of(frame: bytes, signed: SignedPlan, bundle: Bundle) -> Update:
    layout = WorkingBundle(bundle).plan_layout(signed.plan)
    return decode_update(frame, signed_plan=signed, layout=layout)


def run(job: TrainingJob, *, until: int | None = None) -> tuple[bytes, Done, Said]:
    checkpoints = checkpoints_of(job)
    said = Said(checkpoints, until)
    if until is None:
        frame, done = run_round(job, said, checkpoints=checkpoints)
        return frame, done, said
    with pytest.raises(StoppedError):
        run_round(job, said, checkpoints=checkpoints)
    return b"", Done(0, LocalMetrics()), said


@pytest.mark.parametrize("settings", [{}, {"local_kill": 0.9, "steps": 14, "mu": 0.1, "clip_norm": 0.5}])
@pytest.mark.parametrize("cuts", [(2,), (6,), (2, 4, 6)], ids=str)
def test_an_interrupted_training_ends_as_a_whole_one(
    bundle: Bundle, tmp_path: Path, cuts: tuple[int, ...], settings: dict[str, float]
) -> None:
    """Interrupted after any steps, also by a stop just before the end, the update has the same bytes."""
    plan = make_plan(bundle, "AB", **settings)
    job, signed = make_job(tmp_path, bundle, plan)
    whole, done, said = run(job)
    (tmp_path / "checkpoint").unlink(missing_ok=True)
    taken: list[int] = []
    for cut in cuts:
        taken += [event.step for event in run(job, until=cut)[2].of(Stepped)]  # type: ignore[union-attr]
    frame, again, rest = run(job)
    taken += [event.step for event in rest.of(Stepped)]  # type: ignore[union-attr]
    steps = plan.training.steps or 0
    assert taken == list(range(1, steps + 1)), "no step is taken twice, none is left out"
    assert rest.of(Resumed) == [Resumed(cuts[-1], steps)]
    made, wanted = update_of(frame, signed, bundle), update_of(whole, signed, bundle)
    np.testing.assert_array_equal(made.values, wanted.values)
    assert made.metrics.steps == wanted.metrics.steps == steps
    assert (made.metrics.loss_start, made.metrics.loss_end) == (wanted.metrics.loss_start, wanted.metrics.loss_end)
    assert again.skipped == done.skipped
    if "local_kill" in settings:
        assert said.of(Stilled), "the case says something only if modules were stilled"


def test_what_was_evaluated_is_not_evaluated_again(bundle: Bundle, tmp_path: Path) -> None:
    """The score is the one from before the interruption, even if the file has changed since."""
    job, _ = make_job(tmp_path, bundle, make_plan(bundle, "AB"))
    before = run(job, until=3)[2].of(Evaluated)
    write_data(Path(job.evaluation[0]), 4, seed=7)
    _, done, said = run(job)
    assert said.of(Evaluated) == before
    assert done.metrics.eval_examples == 12


@pytest.mark.parametrize("change", ["plan", "data"])
def test_a_checkpoint_of_another_ground_is_written_over(bundle: Bundle, tmp_path: Path, change: str) -> None:
    """Another plan, other data: the training begins at its first step, and says nothing of it."""
    plan = make_plan(bundle, "AB")
    job, _ = make_job(tmp_path, bundle, plan)
    run(job, until=3)
    if change == "plan":
        job, _ = make_job(tmp_path, bundle, msgspec.structs.replace(plan, seed=2))
    else:
        write_data(Path(job.data[0]), 40, seed=5)
    _, _, said = run(job)
    assert [event.step for event in said.of(Stepped)] == [1, 2, 3, 4, 5, 6]  # type: ignore[union-attr]
    assert not said.of(Resumed)
    assert not [event for event in said.of(Notice) if "checkpoint" in event.text]  # type: ignore[union-attr]


def test_a_damaged_checkpoint_costs_its_steps_and_says_so(bundle: Bundle, tmp_path: Path) -> None:
    """A flipped bit, a file of another round: the round begins anew."""
    job, _ = make_job(tmp_path, bundle, make_plan(bundle, "AB"))
    run(job, until=3)
    path = tmp_path / "checkpoint"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    _, done, said = run(job)
    assert done.metrics.steps == 6
    notices = [event.text for event in said.of(Notice) if "begins anew" in event.text]  # type: ignore[union-attr]
    assert len(notices) == 1
    assert "altered" in notices[0]


POSITION = Position(
    np.arange(3, dtype=np.float32),
    np.ones(3, np.float32),
    np.ones(3, np.float32),
    Watched(),
    (0.5, 0.25),
    2.0,
    np.array([np.nan, 0.5], np.float32),
    {1: 7},
)


def written(path: Path, position: Position = POSITION, ground: str = "aa") -> Path:
    checkpoints = Checkpoints(path, VAULT, 4, every_s=0)
    checkpoints.evaluation = Score(1.5, 2, 3)
    checkpoints.begin(ground, count=len(position.values), examples=2)
    checkpoints.after_step(lambda: position)
    return path


def test_a_checkpoint_holds_what_was_put_into_it(tmp_path: Path) -> None:
    """Arrays to the bit, numbers, what stillness saw, and the score."""
    watched = Watched(frozenset({"b", "a"}), 9, np.full(3, 7, np.float32), (1.0, 0.5), 0.25)
    values, first, second = (np.random.default_rng(seed).random(3, np.float32) for seed in (1, 2, 3))
    importance = np.array([np.nan, 0.25], np.float32)
    position = Position(values, first, second, watched, (0.1,), 1.5, importance, {2: 3})
    checkpoints = Checkpoints(written(tmp_path / "c", position), VAULT, 4, every_s=0)
    found, notice = checkpoints.begin("aa", count=3, examples=2)
    assert notice == ""
    assert found is not None
    for name in ("values", "first", "second", "importance"):
        np.testing.assert_array_equal(getattr(found, name), getattr(position, name))
    np.testing.assert_array_equal(found.watched.before, watched.before)  # type: ignore[arg-type]
    assert (found.watched.still, found.watched.skipped) == (watched.still, 9)
    assert (found.watched.shares, found.watched.usual) == ((1.0, 0.5), 0.25)
    assert (found.losses, found.seconds, found.spared, found.step) == ((0.1,), 1.5, {2: 3}, 1)
    assert checkpoints.evaluation == Score(1.5, 2, 3)


def damaged(tmp_path: Path, **changes: Array | None) -> str:
    """The notice about a checkpoint that is encrypted well, and wrong inside."""
    path = written(tmp_path / "c")
    arrays: dict[str, Array | None] = {**parse_tensors(VAULT.read(path, "checkpoint"), what="c"), **changes}
    kept = {name: array for name, array in arrays.items() if array is not None}
    path.write_bytes(VAULT.encrypt(encode_tensors(kept), "checkpoint", round_=4))
    found, notice = Checkpoints(path, VAULT, 4, every_s=0).begin("aa", count=3, examples=2)
    assert found is None
    return notice


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"values": np.zeros(2, np.float32)}, "values: expected 3 finite float32"),
        ({"first": np.full(3, np.nan, np.float32)}, "first: expected 3 finite float32"),
        ({"second": None}, "second: expected 3 finite float32"),
        ({"second": np.zeros(3, np.float16)}, "second: expected 3 finite float32"),
        ({"before": np.zeros(4, np.float32)}, "before: expected 3 finite float32"),
        ({"importance": np.zeros(3, np.float32)}, "importance: expected 2 float32"),
        ({"importance": np.full(2, np.inf, np.float32)}, "importance: expected 2 float32"),
        ({"importance": np.full(2, -1, np.float32)}, "importance: expected 2 float32"),
        ({"record": np.frombuffer(b"{}", np.uint8)}, "missing required field"),
        ({"record": None}, "truncated"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_inside_a_checkpoint_is_named(
    tmp_path: Path, changes: dict[str, Array | None], said: str
) -> None:
    """Whatever it is, the round begins anew with one line."""
    assert said in damaged(tmp_path, **changes)


def test_one_of_another_round_or_key_is_not_taken(tmp_path: Path) -> None:
    """Of another round: given up, by name. Under another key: whole, so it is not overwritten but refused."""
    path = written(tmp_path / "c")
    found, notice = Checkpoints(path, VAULT, 5, every_s=0).begin("aa", count=3, examples=2)
    assert found is None
    assert "of another round" in notice
    with pytest.raises(WrongStorageKeyError):
        Checkpoints(path, vault_of(key=StorageKey(bytes(32))), 4, every_s=0).begin("aa", count=3, examples=2)
    assert path.exists()


def test_checkpoints_are_written_as_seldom_as_was_said(tmp_path: Path) -> None:
    """Every so many seconds; and where a disk is slow, no more than a fiftieth of the time goes into them."""
    clock, cost, made = Clock(), 0.0, list[float]()

    def position() -> Position:
        made.append(clock.now)
        clock.now += cost
        return POSITION

    checkpoints = Checkpoints(tmp_path / "c", VAULT, 4, every_s=30, clock=clock)
    checkpoints.begin("aa", count=3, examples=2)
    for _ in range(100):
        clock.now += 1
        checkpoints.after_step(position)
    assert made == [30, 60, 90]
    made.clear()
    cost = 2.0
    for _ in range(300):
        clock.now += 1
        checkpoints.after_step(position)
    assert [later - earlier for earlier, later in itertools.pairwise(made)] == [102, 102]


def test_before_the_first_step_there_is_nothing_to_keep(tmp_path: Path) -> None:
    """Asked to stop then, it says so, and the process may end at once."""
    checkpoints = Checkpoints(tmp_path / "c", VAULT, 4, every_s=30)
    assert not checkpoints.stop()
    checkpoints.begin("aa", count=3, examples=2)
    checkpoints.after_step(lambda: POSITION)
    assert not (tmp_path / "c").exists()
    assert checkpoints.stop()
    with pytest.raises(StoppedError):
        checkpoints.after_step(lambda: POSITION)
    assert (tmp_path / "c").exists()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_child_that_was_ended_is_gone_on_with(bundle: Bundle, tmp_path: Path, end: signal.Signals) -> None:
    """SIGTERM writes a checkpoint of the step under way; after SIGKILL the last one on disk is the beginning."""
    plan = make_plan(bundle, "AB", steps=40)
    job, signed = make_job(tmp_path, bundle, plan)
    whole, _ = run_round(job, lambda event: None)
    asked = msgspec.structs.replace(
        job, checkpoint=str(tmp_path / "c"), checkpoint_s=0.0 if end == signal.SIGKILL else 1e9
    )
    with subprocess.Popen(CHILD, stdin=PIPE, stdout=PIPE, stderr=PIPE) as child:
        assert child.stdin is not None, "a pipe was asked for"
        assert child.stdout is not None, "a pipe was asked for"
        child.stdin.write(msgspec.json.encode(asked) + b"\n")
        child.stdin.flush()
        steps = 0
        for line in child.stdout:
            event = decode_event(line)
            steps = event.step if isinstance(event, Stepped) else steps
            if steps == 5 and child.poll() is None:
                os.kill(child.pid, end)
        code = child.wait()
    assert code == (143 if end == signal.SIGTERM else -signal.SIGKILL)
    assert not (tmp_path / FRAME_NAME).exists()
    found = run_held(CHILD, msgspec.json.encode(asked))
    assert found.returncode == 0, found.stderr
    events = [decode_event(line) for line in found.stdout.splitlines()]
    (resumed,) = (event for event in events if isinstance(event, Resumed))
    assert (resumed.steps, resumed.step) == (40, steps) if end == signal.SIGTERM else (40, pytest.approx(steps, abs=1))
    frame = VAULT.read(tmp_path / FRAME_NAME, "frame", round_=plan.round)
    made, wanted = update_of(frame, signed, bundle), update_of(whole, signed, bundle)
    np.testing.assert_allclose(made.values, wanted.values, rtol=0, atol=1e-6)
