"""A round whose plan quantises: the frame says what can be said, and the residual file holds the rest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.at_rest import StorageKey
from edge_runtime.bundle import Array, Bundle, open_bundle
from edge_runtime.training.job import FRAME_NAME, RESIDUAL_NAME, Done, Event, Failed, Notice, TrainingJob
from edge_runtime.training.round import run_round
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import Plan, PlanFormatError, Quantisation, SignedPlan, UpdateValueError, decode_update
from tests.edge.encrypted import VAULT, tensors_in, vault_of, write_tensors_to
from tests.edge.training.test_round import make_job, make_plan, run_child

RANGE = 0.03  # half of what six steps at a rate of 1e-2 may move


@pytest.fixture
def bundle(bert_bundle: Path) -> Bundle:
    return open_bundle(bert_bundle)


def quantised(bundle: Bundle, plan: Plan, *, bits: int = 4, range_: float = RANGE) -> Plan:
    blocks = len(WorkingBundle(bundle).plan_layout(plan).blocks)
    return msgspec.structs.replace(plan, quantisation=Quantisation(bits, (range_,) * blocks))  # type: ignore[arg-type]


def train(bundle: Bundle, job: TrainingJob, signed: SignedPlan) -> tuple[dict[str, Array], list[str]]:
    """What was sent, by tensor, and what the user was told."""
    events: list[Event] = []
    frame, _ = run_round(job, events.append)
    layout = WorkingBundle(bundle).plan_layout(signed.plan)
    update = decode_update(frame, signed_plan=signed, layout=layout)
    return layout.split(update.values), [event.text for event in events if isinstance(event, Notice)]


def folders(path: Path, names: Iterable[str]) -> list[Path]:
    made = [path / name for name in names]
    for folder in made:
        folder.mkdir()
    return made


@pytest.mark.parametrize("bits", [4, 8])
def test_sent_and_left_out_are_the_change(bundle: Bundle, tmp_path: Path, bits: int) -> None:
    """The same training in float32 says what the change is; it writes no residual."""
    plain, coarse = folders(tmp_path, ["plain", "coarse"])
    plan = make_plan(bundle, "B")
    change, _ = train(bundle, *make_job(plain, bundle, plan))
    assert not (plain / RESIDUAL_NAME).exists()
    sent, _ = train(bundle, *make_job(coarse, bundle, quantised(bundle, plan, bits=bits)))
    left = tensors_in(coarse / RESIDUAL_NAME, "residual")
    assert set(left) == set(sent) == set(change)
    for name, part in change.items():
        assert np.abs(sent[name]).max() <= RANGE + 1e-8
        owed = part.astype(np.float64) - sent[name]
        np.testing.assert_allclose(left[name], np.clip(owed, -RANGE, RANGE), atol=1e-8)
    assert max(np.abs(part).max() for part in change.values()) > RANGE  # so that something was cut
    assert max(np.abs(part).max() for part in left.values()) > 0.1 * RANGE


def test_what_is_owed_is_paid(bundle: Bundle, tmp_path: Path) -> None:
    """Learning rates of zero change nothing, so what is sent is what earlier updates left out."""
    plan = quantised(bundle, make_plan(bundle, "B", lr_a=0.0, lr_b=0.0, lr_head=0.0), bits=8)
    job, signed = make_job(tmp_path, bundle, plan)
    name = f"{bundle.manifest.module_names[0]}.lora_b"
    shape = bundle.initial_adapter()[name].shape
    owed = np.random.default_rng(3).uniform(-RANGE, RANGE, size=shape).astype(np.float32)
    dead = name.replace("lora_b", "lora_a")
    other = np.ones(bundle.initial_adapter()[dead].shape, np.float32)
    stranger = f"{bundle.manifest.module_names[1]}.lora_b"
    old = tmp_path / "old.safetensors"
    write_tensors_to(old, "residual", {name: owed, dead: other, stranger: np.ones((1, 2), np.float32)})
    before = old.read_bytes()
    sent, told = train(bundle, msgspec.structs.replace(job, residual=str(old)), signed)
    left = tensors_in(tmp_path / RESIDUAL_NAME, "residual")
    assert np.abs(sent[name] - owed).max() <= RANGE / 127 * 1.001
    np.testing.assert_allclose(left[name], owed - sent[name], atol=1e-9)
    assert not any(part.any() for key, part in sent.items() if key != name)
    np.testing.assert_array_equal(left[dead], other)  # kept until A is alive again
    assert told[-1] == f"what earlier updates left out is dropped where ranks changed: {stranger}"
    assert old.read_bytes() == before


def test_a_damaged_residual_is_told_and_training_goes_on(bundle: Bundle, tmp_path: Path) -> None:
    job, signed = make_job(tmp_path, bundle, quantised(bundle, make_plan(bundle, "B", steps=2)))
    old = tmp_path / "old.safetensors"
    old.write_bytes(b"rot" * 100)
    _, told = train(bundle, msgspec.structs.replace(job, residual=str(old)), signed)
    assert told[-1].startswith("what earlier updates left out is lost: ")
    assert "old.safetensors: not an encrypted file" in told[-1]


def test_a_residual_under_another_storage_key_is_kept_and_told(bundle: Bundle, tmp_path: Path) -> None:
    """It is whole, and the key that opens it may be found again: the user must act, and nothing replaces it."""
    job, _ = make_job(tmp_path, bundle, quantised(bundle, make_plan(bundle, "B", steps=2)))
    old = tmp_path / "old.safetensors"
    write_tensors_to(old, "residual", {}, vault_of(key=StorageKey(bytes(32))))
    before = old.read_bytes()
    code, events = run_child(msgspec.structs.replace(job, residual=str(old)), tmp_path)
    assert code == 2
    assert isinstance(events[-1], Failed)
    assert events[-1].input
    assert "old.safetensors: encrypted under another storage key: it needs " in events[-1].message
    assert old.read_bytes() == before
    assert not (tmp_path / RESIDUAL_NAME).exists()
    assert not (tmp_path / FRAME_NAME).exists()


def test_devices_draw_for_themselves(bundle: Bundle, tmp_path: Path) -> None:
    """The seed of the rounding is the job's, and nothing else follows it: sent and left out add up to one change."""
    plan = quantised(bundle, make_plan(bundle, "B", steps=2))
    found = []
    for seed, folder in enumerate(folders(tmp_path, ["one", "two"])):
        job, signed = make_job(folder, bundle, plan)
        sent, _ = train(bundle, msgspec.structs.replace(job, rounding_seed=seed), signed)
        found.append((sent, tensors_in(folder / RESIDUAL_NAME, "residual")))
    (one, one_left), (two, two_left) = found
    assert any((one[name] != two[name]).mean() > 0.05 for name in one)
    for name in one:
        np.testing.assert_allclose(one[name] + one_left[name], two[name] + two_left[name], atol=1e-7)


def test_what_leaves_the_bounds_is_not_hidden_by_rounding(bundle: Bundle, tmp_path: Path) -> None:
    """A device whose training diverges is refused by name, as without quantisation."""
    job, _ = make_job(tmp_path, bundle, quantised(bundle, make_plan(bundle, "B", lr_b=5.0, steps=3)))
    with pytest.raises(UpdateValueError, match="within ±8"):
        run_round(job, lambda event: None)
    assert not (tmp_path / RESIDUAL_NAME).exists()


def test_a_plan_with_other_ranges_than_blocks_is_not_obeyed(bundle: Bundle, tmp_path: Path) -> None:
    plan = msgspec.structs.replace(make_plan(bundle, "B"), quantisation=Quantisation(8, (1.0,)))
    job, _ = make_job(tmp_path, bundle, plan)
    with pytest.raises(PlanFormatError, match="ranges, one a block, got 1"):
        run_round(job, lambda event: None)


def test_the_child_writes_frame_and_residual(bundle: Bundle, tmp_path: Path) -> None:
    job, signed = make_job(tmp_path, bundle, quantised(bundle, make_plan(bundle, "A", steps=2)))
    code, events = run_child(job, tmp_path)
    assert (code, type(events[-1])) == (0, Done)
    frame = VAULT.read(tmp_path / FRAME_NAME, "frame", round_=job.round)
    layout = WorkingBundle(bundle).plan_layout(signed.plan)
    assert len(frame) == layout.frame_bytes < 148 + layout.count
    assert set(tensors_in(tmp_path / RESIDUAL_NAME, "residual")) == {name for name, _ in layout.blocks}
