"""One round of training: from a signed plan and local files to an update frame, in this process and in the child."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.bundle import Bundle, encode_tensors, open_bundle
from edge_runtime.data import BadRecordError
from edge_runtime.training.job import (
    FRAME_NAME,
    JOB_PURPOSES,
    Done,
    Evaluated,
    Event,
    Failed,
    Notice,
    Stepped,
    TrainingJob,
    decode_event,
)
from edge_runtime.training.round import run_round
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import (
    ModulePlan,
    Plan,
    PlanSignatureError,
    SignedPlan,
    Training,
    UpdateRules,
    UpdateValueError,
    decode_update,
    sign_plan,
)
from tests.edge.encrypted import VAULT
from tests.edge.held import run_held

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
LABELS = ("asyncio", "email", "tkinter", "xml")


def write_data(path: Path, count: int, *, seed: int = 0) -> Path:
    """Each label has words of its own, so that a random model can learn them."""
    rng = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        label = index % len(LABELS)
        words = [f"word{label * 10 + int(word)}" for word in rng.integers(0, 10, size=8)]
        lines.append(json.dumps({"text": " ".join(words), "label": LABELS[label]}))
    path.write_text("\n".join(lines))
    return path


def make_plan(bundle: Bundle, alive: str, **training: float) -> Plan:
    adapter = encode_tensors(bundle.initial_adapter())
    settings = {"batch_size": 8, "max_tokens": 16, "steps": 6, "lr_a": 1e-2, "lr_b": 1e-2, "lr_head": 1e-2, **training}
    return Plan(
        schema=1,
        task="t",
        round=3,
        rounds=9,
        state="train",
        bundle=bundle.digest,
        adapter=hashlib.sha256(adapter).hexdigest(),
        adapter_bytes=len(adapter),
        modules=tuple(ModulePlan(name, 4, alive) for name in bundle.manifest.module_names),  # type: ignore[arg-type]
        head_alive=True,
        training=Training(**settings),  # type: ignore[arg-type]
        update=UpdateRules(),
        seed=1,
        deadline=0.0,
        round_key="00" * 32,
    )


def make_job(tmp_path: Path, bundle: Bundle, plan: Plan, *, lines: int = 40) -> tuple[TrainingJob, SignedPlan]:
    signed = sign_plan(plan, KEY)
    (tmp_path / "plan").write_bytes(signed.data)
    (tmp_path / "adapter.safetensors").write_bytes(encode_tensors(bundle.initial_adapter()))
    job = TrainingJob(
        plan=str(tmp_path / "plan"),
        plan_key=KEY.public_key().public_bytes_raw().hex(),
        bundle=str(bundle.folder),
        adapter=str(tmp_path / "adapter.safetensors"),
        data=(str(write_data(tmp_path / "data.jsonl", lines)),),
        evaluation=(str(write_data(tmp_path / "held-out.jsonl", 12, seed=1)),),
        out=str(tmp_path),
        round=plan.round,
        grant=VAULT.grant(*JOB_PURPOSES),
    )
    return job, signed


@pytest.fixture
def bundle(bert_bundle: Path) -> Bundle:
    return open_bundle(bert_bundle)


def test_only_alive_factors_are_in_the_frame(bundle: Bundle, tmp_path: Path) -> None:
    """With B alive the frame holds every B and the head, each moved, and not one value of A."""
    job, signed = make_job(tmp_path, bundle, make_plan(bundle, "B"))
    events: list[Event] = []
    frame, done = run_round(job, events.append)
    layout = WorkingBundle(bundle).layout(signed.plan.modules, head_alive=True)
    update = decode_update(frame, signed_plan=signed, layout=layout)
    parts = layout.split(update.values)
    assert not [name for name in parts if name.endswith("lora_a")]
    assert all(np.abs(part).max() > 0 for part in parts.values())
    assert update.weight == done.weight == 40
    assert [event.step for event in events if isinstance(event, Stepped)] == [1, 2, 3, 4, 5, 6]
    assert [event.examples for event in events if isinstance(event, Evaluated)] == [12]
    assert update.metrics.steps == 6
    assert update.metrics.eval_examples == 12
    assert update.metrics.loss_end < update.metrics.loss_start  # type: ignore[operator]  # both are measured


@pytest.mark.parametrize("alive", ["A", "B", "AB"])
def test_only_trained_components_are_in_the_frame(bundle: Bundle, tmp_path: Path, alive: str) -> None:
    """After one step they have moved as in a round that trains all, for the others stay in the forward pass."""
    rng = np.random.default_rng(0)
    adapter = {
        name: rng.normal(scale=0.1, size=a.shape).astype(np.float32) for name, a in bundle.initial_adapter().items()
    }
    whole = make_plan(bundle, alive, steps=1)
    listed = {module.name: (0, 2, 3)[number % 2 :] for number, module in enumerate(whole.modules)}
    modules = tuple(msgspec.structs.replace(module, trained=listed[module.name]) for module in whole.modules)
    found = []
    for plan in (whole, msgspec.structs.replace(whole, modules=modules)):
        job, signed = make_job(tmp_path, bundle, plan)
        Path(job.adapter).write_bytes(encode_tensors(adapter))
        frame, _ = run_round(job, lambda event: None)
        layout = WorkingBundle(bundle).layout(signed.plan.modules, head_alive=True)
        found.append(layout.split(decode_update(frame, signed_plan=signed, layout=layout).values))
    everything, some = found
    assert some.keys() == everything.keys()
    for name, part in some.items():
        wanted = everything[name]
        if name.endswith(".lora_a"):
            wanted = wanted[list(listed[name.removesuffix(".lora_a")])]
        if name.endswith(".lora_b"):
            wanted = wanted[:, list(listed[name.removesuffix(".lora_b")])]
        np.testing.assert_array_equal(part, wanted)
        assert part.any()


def test_same_plan_and_data_give_the_same_update(bundle: Bundle, tmp_path: Path) -> None:
    """A device that trains a round again after a crash sends what it would have sent."""
    job, _ = make_job(tmp_path, bundle, make_plan(bundle, "A"))
    first, second = (run_round(job, lambda event: None)[0] for _ in range(2))
    trailer = 64  # seconds and memory are in the trailer and may differ
    assert first[:-trailer] == second[:-trailer]


def test_all_devices_start_bit_identical(bundle: Bundle, tmp_path: Path) -> None:
    """With learning rates of zero the change is exactly zero: nothing of the adapter was altered by loading it."""
    job, signed = make_job(tmp_path, bundle, make_plan(bundle, "AB", lr_a=0.0, lr_b=0.0, lr_head=0.0))
    frame, _ = run_round(job, lambda event: None)
    layout = WorkingBundle(bundle).layout(signed.plan.modules, head_alive=True)
    assert not decode_update(frame, signed_plan=signed, layout=layout).values.any()


def test_update_outside_the_bounds_is_never_made(bundle: Bundle, tmp_path: Path) -> None:
    """A learning rate that leaves the plan's bound is found on the device."""
    job, _ = make_job(tmp_path, bundle, make_plan(bundle, "B", lr_b=5.0, steps=3))
    with pytest.raises(UpdateValueError, match="within ±8"):
        run_round(job, lambda event: None)


def test_plan_of_another_key_is_not_obeyed(bundle: Bundle, tmp_path: Path) -> None:
    """The child checks the signature again."""
    job, _ = make_job(tmp_path, bundle, make_plan(bundle, "B"))
    other = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\1").public_key().public_bytes_raw().hex()
    with pytest.raises(PlanSignatureError):
        run_round(msgspec.structs.replace(job, plan_key=other), lambda event: None)


def test_bad_line_is_named_and_skipped_only_when_asked(bundle: Bundle, tmp_path: Path) -> None:
    """File and line number of a bad record; with skip_bad the rest trains."""
    job, _ = make_job(tmp_path, bundle, make_plan(bundle, "B"))
    data = Path(job.data[0])
    data.write_text(data.read_text() + '\n{"text": "word1", "label": "nosuch"}')
    with pytest.raises(BadRecordError, match=r"data\.jsonl:41: .*nosuch"):
        run_round(job, lambda event: None)
    _, done = run_round(msgspec.structs.replace(job, skip_bad=True), lambda event: None)
    assert done.weight == 40


def frozen_below(bundle: Bundle, block: int, **training: float) -> Plan:
    """A plan that keeps the factors below a block dead."""
    plan = make_plan(bundle, "AB", **training)
    blocks = {module.name: module.block for module in bundle.manifest.modules}
    modules = tuple(
        module if blocks[module.name] >= block else msgspec.structs.replace(module, alive="") for module in plan.modules
    )
    return msgspec.structs.replace(plan, modules=modules)


def changes(bundle: Bundle, frame: bytes, signed: SignedPlan) -> np.ndarray:
    layout = WorkingBundle(bundle).layout(signed.plan.modules, head_alive=True)
    return decode_update(frame, signed_plan=signed, layout=layout).values


def test_remembering_makes_the_same_update_and_leaves_no_file(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs with two frozen blocks: the update is that of a device that remembers nothing, to half precision."""
    opened: list[str] = []
    named = tempfile.TemporaryFile

    def temporary(*, dir: Path, buffering: int) -> IO[bytes]:
        opened.append(str(dir))
        return named(dir=dir, buffering=buffering)

    monkeypatch.setattr(tempfile, "TemporaryFile", temporary)
    job, signed = make_job(tmp_path, bundle, frozen_below(bundle, 2, steps=15))
    files = sorted(path.name for path in tmp_path.iterdir())
    plain, _ = run_round(msgspec.structs.replace(job, remember_mb=0), lambda event: None)
    assert opened == []
    frame, _ = run_round(job, lambda event: None)
    assert opened == [job.out]
    found, wanted = (changes(bundle, each, signed) for each in (frame, plain))
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 5e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_a_full_disk_is_told_and_training_goes_on(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job, signed = make_job(tmp_path, bundle, frozen_below(bundle, 2, steps=15))
    plain, _ = run_round(msgspec.structs.replace(job, remember_mb=0), lambda event: None)
    monkeypatch.setattr(os, "pwrite", full)
    events: list[Event] = []
    frame, _ = run_round(job, events.append)
    np.testing.assert_array_equal(*(changes(bundle, each, signed) for each in (frame, plain)))
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert notices[-1] == "remembering ended, blocks are computed again: No space left on device"


def test_pieces_of_a_batch_make_the_same_update(bundle: Bundle, tmp_path: Path) -> None:
    """A job may say how many tokens go through the model at once."""
    job, signed = make_job(tmp_path, bundle, make_plan(bundle, "B", steps=3))
    whole, _ = run_round(job, lambda event: None)
    pieces, _ = run_round(msgspec.structs.replace(job, micro_tokens=32), lambda event: None)
    found, wanted = (changes(bundle, each, signed) for each in (pieces, whole))
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-3


def run_child(job: TrainingJob, tmp_path: Path) -> tuple[int, list[Event]]:
    command = [sys.executable, "-W", "error", "-m", "edge_runtime.training.child"]
    done = run_held(command, msgspec.json.encode(job))
    assert done.stderr == b"", done.stderr.decode()
    return done.returncode, [decode_event(line) for line in done.stdout.splitlines()]


def test_child_writes_the_frame_before_it_says_done(bundle: Bundle, tmp_path: Path) -> None:
    """The child process tells every step, ends with done and 0, and the frame is there."""
    job, signed = make_job(tmp_path, bundle, make_plan(bundle, "A"))
    code, events = run_child(job, tmp_path)
    assert code == 0
    assert isinstance(events[-1], Done)
    layout = WorkingBundle(bundle).layout(signed.plan.modules, head_alive=True)
    update = decode_update(VAULT.read(tmp_path / FRAME_NAME, "frame", round_=3), signed_plan=signed, layout=layout)
    assert update.metrics == events[-1].metrics or update.metrics.steps == events[-1].metrics.steps
    assert sum(isinstance(event, Stepped) for event in events) == 6


@pytest.mark.parametrize(("break_it", "code", "word"), [("data", 2, "bad line"), ("adapter", 1, "TensorFileError")])
def test_child_says_who_must_act(bundle: Bundle, tmp_path: Path, break_it: str, code: int, word: str) -> None:
    """Bad data ends with 2 and input true, a bad artifact with 1; no frame is left either way."""
    job, _ = make_job(tmp_path, bundle, make_plan(bundle, "B"))
    if break_it == "data":
        Path(job.data[0]).write_text("not json\n")
    else:
        Path(job.adapter).write_bytes(b"\0" * 100)
    got, events = run_child(job, tmp_path)
    assert got == code
    assert isinstance(events[-1], Failed)
    assert events[-1].input == (code == 2)
    assert word in events[-1].message
    assert not (tmp_path / FRAME_NAME).exists()
