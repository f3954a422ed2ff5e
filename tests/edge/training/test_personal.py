"""Parameters that a device trains and keeps: in no frame, put over the published adapter, carried over by a file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_runtime.bundle import Array, Bundle, open_bundle
from edge_runtime.engine.adamw import AdamW
from edge_runtime.engine.errors import DivergedError
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.training.job import PERSONAL_NAME, Done, Evaluated, Event, Notice, TrainingJob
from edge_runtime.training.local import Course, train
from edge_runtime.training.round import run_round
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import ModulePlan, Personal, Plan, Quantisation, SignedPlan, decode_update
from tests.edge.encrypted import tensors_in, write_tensors_to
from tests.edge.training.test_round import make_job, make_plan, run_child


@pytest.fixture
def bundle(bert_bundle: Path) -> Bundle:
    return open_bundle(bert_bundle)


def personal_plan(bundle: Bundle, *parts: Personal, **training: float) -> Plan:
    """A is shared; B and the head are, unless they are personal."""
    plan = make_plan(bundle, "A" if "B" in parts else "AB", **training)
    return msgspec.structs.replace(plan, head_alive="head" not in parts, personal=parts or msgspec.UNSET)


def personal_names(bundle: Bundle, parts: tuple[Personal, ...]) -> set[str]:
    factors = {f"{name}.lora_b" for name in bundle.manifest.module_names}
    head = {f"classifier.{name}" for name in ("weight", "bias")}
    return (factors if "B" in parts else set()) | (head if "head" in parts else set())


def run(bundle: Bundle, job: TrainingJob, signed: SignedPlan) -> tuple[dict[str, Array], list[Event], bytes]:
    """What was sent, by tensor, what was told, and the frame."""
    events: list[Event] = []
    frame, _ = run_round(job, events.append)
    layout = WorkingBundle(bundle).plan_layout(signed.plan)
    return layout.split(decode_update(frame, signed_plan=signed, layout=layout).values), events, frame


def reference(bundle: Bundle, job: TrainingJob, plan: Plan, adapter: dict[str, Array]) -> AdapterParameters:
    """The same training with everything alive, which the layout of the update then divides."""
    work = WorkingBundle(bundle)
    modules = [ModulePlan(name, 4, "AB") for name in bundle.manifest.module_names]
    head = plan.head_alive or "head" in plan.personal_parts
    parameters = AdapterParameters(adapter, work.layout(modules, head_alive=head))
    data = work.dataset([Path(job.data[0])], max_tokens=plan.training.max_tokens, skip_bad=False)
    course = Course(data, plan.training, np.random.default_rng([plan.seed, plan.round]))
    train(work.engine, parameters, course)
    return parameters


@pytest.mark.parametrize("parts", [("head",), ("B",), ("head", "B")])
def test_it_is_trained_with_the_rest_and_kept_apart(
    bundle: Bundle, tmp_path: Path, parts: tuple[Personal, ...]
) -> None:
    """Sent and kept together are what a training of everything makes of the adapter, to the bit."""
    plan = personal_plan(bundle, *parts)
    job, signed = make_job(tmp_path, bundle, plan)
    sent, _, _ = run(bundle, job, signed)
    kept = tensors_in(tmp_path / PERSONAL_NAME, "personal")
    names = personal_names(bundle, parts)
    assert set(kept) == names
    everything = reference(bundle, job, plan, bundle.initial_adapter())
    assert set(sent) == set(everything.alive) - names
    changes = everything.layout.split(everything.change())
    for name, array in everything.tensors.items():
        if name in names:
            np.testing.assert_array_equal(kept[name], array)
            assert changes[name].any()
        else:
            np.testing.assert_array_equal(sent[name], changes[name])


@pytest.mark.parametrize("bits", [0, 8])
def test_no_bytes_of_it_are_in_the_frame(bundle: Bundle, tmp_path: Path, bits: int) -> None:
    """Neither its values nor its change; what is shared is there, so the search would find it."""
    plan = personal_plan(bundle, "head", "B")
    blocks = len(WorkingBundle(bundle).plan_layout(plan).blocks)
    if bits:
        plan = msgspec.structs.replace(plan, quantisation=Quantisation(8, (0.1,) * blocks))
    job, signed = make_job(tmp_path, bundle, plan)
    sent, _, frame = run(bundle, job, signed)
    before, kept = bundle.initial_adapter(), tensors_in(tmp_path / PERSONAL_NAME, "personal")
    secret = [array for name, after in kept.items() for array in (after, after - before[name], before[name])]
    assert len(frame) == WorkingBundle(bundle).plan_layout(plan).frame_bytes
    if not bits:
        assert all(found_in(frame, array) for array in sent.values())
    assert not any(found_in(frame, array) for array in secret)


def found_in(data: bytes, array: Array) -> bool:
    """Whether two values that are not zero stand next to one another in ``data`` as they do in the array."""
    flat = np.ascontiguousarray(array, "<f4").reshape(-1)
    return any(flat[i : i + 2].all() and flat[i : i + 2].tobytes() in data for i in range(len(flat) - 1))


def test_what_was_kept_is_put_over_the_published_adapter(bundle: Bundle, tmp_path: Path) -> None:
    """It is evaluated and trained from there; what the file has beside it is of no account."""
    plan = personal_plan(bundle, "head", "B")
    job, signed = make_job(tmp_path, bundle, plan)
    rng = np.random.default_rng(5)
    names = personal_names(bundle, ("head", "B"))
    initial = bundle.initial_adapter()
    own = {name: rng.normal(scale=0.1, size=initial[name].shape).astype(np.float32) for name in sorted(names)}
    stray = f"{bundle.manifest.module_names[0]}.lora_a"
    file = tmp_path / "mine.safetensors"
    write_tensors_to(file, "personal", {**own, stray: np.ones_like(initial[stray])})
    _, plain, _ = run(bundle, job, signed)
    job = msgspec.structs.replace(job, personal=str(file))
    sent, events, _ = run(bundle, job, signed)
    wanted = reference(bundle, job, plan, {**initial, **own})
    kept = tensors_in(tmp_path / PERSONAL_NAME, "personal")
    assert set(kept) == names
    for name in names:
        np.testing.assert_array_equal(kept[name], wanted.tensors[name])
    np.testing.assert_array_equal(sent[stray], wanted.tensors[stray] - initial[stray])
    losses = [event.loss for found in (plain, events) for event in found if isinstance(event, Evaluated)]
    assert losses[0] != losses[1]


def test_a_dead_module_keeps_what_it_had(bundle: Bundle, tmp_path: Path) -> None:
    """Its B is in the forward pass and in the file, and is not trained."""
    plan = personal_plan(bundle, "B")
    dead = plan.modules[0].name
    modules = (msgspec.structs.replace(plan.modules[0], alive=""), *plan.modules[1:])
    job, signed = make_job(tmp_path, bundle, msgspec.structs.replace(plan, modules=modules))
    name = f"{dead}.lora_b"
    mine = np.full(bundle.initial_adapter()[name].shape, 0.25, np.float32)
    file = tmp_path / "mine.safetensors"
    write_tensors_to(file, "personal", {name: mine})
    sent, _, _ = run(bundle, msgspec.structs.replace(job, personal=str(file)), signed)
    kept = tensors_in(tmp_path / PERSONAL_NAME, "personal")
    np.testing.assert_array_equal(kept[name], mine)
    assert f"{dead}.lora_a" not in sent
    assert all(array.any() for array in kept.values())


def test_a_changed_rank_starts_again_with_a_notice(bundle: Bundle, tmp_path: Path) -> None:
    plan = personal_plan(bundle, "B")
    job, signed = make_job(tmp_path, bundle, plan)
    first, second = (f"{name}.lora_b" for name in bundle.manifest.module_names[:2])
    initial = bundle.initial_adapter()
    file = tmp_path / "mine.safetensors"
    mine = {first: np.ones((len(initial[first]), 3), np.float32), second: np.full_like(initial[second], 0.1)}
    write_tensors_to(file, "personal", mine)
    job = msgspec.structs.replace(job, personal=str(file))
    _, events, _ = run(bundle, job, signed)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert told[0] == f"what this device kept for itself starts again where shapes changed: {first}"
    wanted = reference(bundle, job, plan, {**initial, second: mine[second]})
    np.testing.assert_array_equal(tensors_in(tmp_path / PERSONAL_NAME, "personal")[first], wanted.tensors[first])


def test_a_damaged_file_is_told_and_training_goes_on(bundle: Bundle, tmp_path: Path) -> None:
    job, signed = make_job(tmp_path, bundle, personal_plan(bundle, "head", steps=2))
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"rot" * 100)
    _, events, _ = run(bundle, msgspec.structs.replace(job, personal=str(file)), signed)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert told[0].startswith("what this device kept for itself is lost and starts again: ")
    assert "mine.safetensors: not an encrypted file" in told[0]
    assert file.read_bytes() == b"rot" * 100


def test_what_is_not_finite_is_never_kept(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last step that breaks the head alone is not seen in any loss."""
    job, _ = make_job(tmp_path, bundle, personal_plan(bundle, "head", steps=2))
    real = AdamW.step

    def breaking(self: AdamW, *arguments: object, **named: object) -> float:
        norm = real(self, *arguments, **named)  # type: ignore[arg-type]
        if self.steps == 2:
            self._parameters.tensors["classifier.bias"][0] = np.inf
        return norm

    monkeypatch.setattr(AdamW, "step", breaking)
    with pytest.raises(DivergedError, match=r"classifier.bias is no longer finite"):
        run_round(job, lambda event: None)
    assert not (tmp_path / PERSONAL_NAME).exists()


def test_a_plan_that_leaves_nothing_writes_no_file(bundle: Bundle, tmp_path: Path) -> None:
    job, signed = make_job(tmp_path, bundle, personal_plan(bundle, steps=2))
    run(bundle, job, signed)
    assert not (tmp_path / PERSONAL_NAME).exists()


def test_the_child_writes_frame_and_personal_part(bundle: Bundle, tmp_path: Path) -> None:
    job, _ = make_job(tmp_path, bundle, personal_plan(bundle, "head", steps=2))
    code, events = run_child(job, tmp_path)
    assert (code, type(events[-1])) == (0, Done)
    assert set(tensors_in(tmp_path / PERSONAL_NAME, "personal")) == personal_names(bundle, ("head",))
