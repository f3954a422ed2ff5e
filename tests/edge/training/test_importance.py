"""A share of a device's examples, drawn by what each of them still has to teach."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.at_rest import StorageKey, WrongStorageKeyError
from edge_runtime.bundle import Array, Bundle, open_bundle
from edge_runtime.data import Dataset, training_batches
from edge_runtime.engine.head import example_importance
from edge_runtime.engine.model import BlockEngine
from edge_runtime.training.accumulate import accumulate
from edge_runtime.training.checkpoint import Checkpoints, StoppedError
from edge_runtime.training.importance import draw, draw_sample
from edge_runtime.training.job import IMPORTANCE_NAME, Done, Event, Notice, Stepped, TrainingJob
from edge_runtime.training.round import run_round
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire import Plan, UpdateRules, decode_update
from tests.edge.encrypted import VAULT, tensors_in, vault_of, write_tensors_to
from tests.edge.training.random_learning import alive_from, random_dataset, random_parameters
from tests.edge.training.test_accumulate import batch_of
from tests.edge.training.test_round import make_job, make_plan, write_data

LENGTHS = (3, 40, 12, 25, 11, 7, 40, 33)


@pytest.fixture
def bundle(bert_bundle: Path) -> Bundle:
    return open_bundle(bert_bundle)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def known(*values: float) -> Array:
    return np.array(values, np.float32)


# what is drawn


@given(count=st.integers(1, 200), share=st.floats(0.001, 1.0), seed=st.integers(0, 9))
def test_a_share_of_the_examples_is_drawn_each_at_most_once(count: int, share: float, seed: int) -> None:
    chosen = draw(rng(seed).random(count, np.float32), share, rng(seed))
    assert len(chosen) == max(1, int(np.ceil(share * count - 1e-9)))
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < count


def test_a_tenth_of_thirty_is_three() -> None:
    assert len(draw(known(*[1.0] * 30), 0.1, rng())) == 3


def test_one_of_two_is_drawn_as_often_as_its_importance_says() -> None:
    """3 and 1, and a tenth of their mean for each: 3.2 of 4.4."""
    drawn = [int(draw(known(3.0, 1.0), 0.5, rng(seed))[0]) for seed in range(4000)]
    assert np.mean(np.array(drawn) == 0) == pytest.approx(3.2 / 4.4, abs=0.025)  # four standard errors are 0.028


def test_what_was_never_trained_is_as_important_as_the_most_important() -> None:
    """Of one that is unknown and one that is known, with a third that teaches nothing, the first two are alike."""
    drawn = np.concatenate([draw(known(np.nan, 2.0, 0.0), 1 / 3, rng(seed)) for seed in range(4000)])
    counts = np.bincount(drawn, minlength=3) / 4000
    assert counts[0] == pytest.approx(counts[1], abs=0.045)
    assert 0 < counts[2] < 0.06  # a tenth of the mean: 0.133 of 4.4


@pytest.mark.parametrize("importance", [(0.0, 0.0, 0.0, 0.0), (np.nan,) * 4, (0.0, np.nan, 0.0, np.nan)], ids=str)
def test_where_nothing_is_known_or_left_a_draw_is_still_one(importance: tuple[float, ...]) -> None:
    drawn = np.concatenate([draw(known(*importance), 0.5, rng(seed)) for seed in range(200)])
    assert (np.bincount(drawn, minlength=4) > 0).all()


def test_the_same_generator_draws_the_same() -> None:
    values = rng(5).random(50, np.float32)
    assert draw(values, 0.4, rng(7)).tolist() == draw(values, 0.4, rng(7)).tolist()
    assert draw(values, 0.4, rng(7)).tolist() != draw(values, 0.4, rng(8)).tolist()


# what an example's importance is


def test_it_is_the_mean_norm_of_its_rows_own_gradients() -> None:
    """Against a sum over rows one by one; examples have one or two."""
    batch = batch_of([1, 4, 2, 1])
    d_rows = rng(1).standard_normal((len(batch.rows), 5)).astype(np.float32)
    width = batch.input_ids.shape[1]
    wanted = []
    for example in range(4):
        mine = [gradient for row, gradient in zip(batch.rows, d_rows, strict=True) if row // width == example]
        wanted.append(sum(float(np.sqrt((gradient * gradient).sum())) for gradient in mine) * len(d_rows) / len(mine))
    np.testing.assert_allclose(example_importance(d_rows, batch), wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("micro_tokens", [10_000, 64])
def test_it_is_the_same_in_any_company(request: pytest.FixtureRequest, kind: str, micro_tokens: int) -> None:
    """Alone, in a batch, and in a batch that is divided."""
    bundle = open_bundle(request.getfixturevalue(f"{kind}_bundle"))
    dataset, engine = random_dataset(bundle, LENGTHS), BlockEngine(bundle)
    engine.use(random_parameters(bundle, alive_from(bundle, 1)))
    (batch,) = training_batches(dataset, len(dataset), steps=1, rng=rng())
    together = accumulate(engine, batch, micro_tokens).importance
    assert together is not None
    for example, importance in zip(batch.examples.tolist(), together, strict=True):
        (alone,) = training_batches(dataset.take([example]), 1, steps=1, rng=rng())
        assert engine.gradients(alone).importance == pytest.approx([importance], rel=1e-4)
    assert len(set(together.tolist())) == len(together)


# what is kept


def some_data(bundle: Bundle, folder: Path, count: int = 40, *, seed: int = 0) -> Dataset:
    path = write_data(folder / "some.jsonl", count, seed=seed)
    return WorkingBundle(bundle).dataset([path], max_tokens=16, skip_bad=False)


def test_what_a_round_found_is_what_the_next_one_knows(bundle: Bundle, tmp_path: Path) -> None:
    """By example, not by place: examples that have gone are forgotten, new ones are not known."""
    data, file = some_data(bundle, tmp_path), tmp_path / "f"
    sample = draw_sample(data, 0.25, None, VAULT, rng())
    assert sample.chosen is not None
    assert len(sample.dataset) == len(sample.chosen) == 10
    assert np.isnan(sample.importance).all()
    found = rng(2).random(10, np.float32)
    write_tensors_to(file, "importance", sample.encoded(found))
    moved = dataclasses.replace(data, examples=(*some_data(bundle, tmp_path, 4, seed=9).examples, *data.examples[5:]))
    again = draw_sample(moved, 0.25, file, VAULT, rng())
    wanted = np.full(40, np.nan, np.float32)
    wanted[sample.chosen] = found
    np.testing.assert_array_equal(again.importance, [np.nan] * 4 + wanted[5:].tolist())
    assert not again.notice


def test_what_was_not_seen_again_is_kept(bundle: Bundle, tmp_path: Path) -> None:
    """Where training did not come to an example, or the engine says nothing of it, what was known of it stays."""
    data, file = some_data(bundle, tmp_path), tmp_path / "f"
    first = dataclasses.replace(draw_sample(data, 0.5, None, VAULT, rng()), importance=rng(3).random(40, np.float32))
    write_tensors_to(file, "importance", first.encoded(np.full(20, np.nan, np.float32)))
    np.testing.assert_array_equal(draw_sample(data, 0.5, file, VAULT, rng()).importance, first.importance)


KEYS = np.zeros((2, 16), np.uint8)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (b"short", "too short"),
        ({"keys": KEYS}, "expected keys of 16 bytes and importance"),
        ({"keys": KEYS[:1], "importance": known(1, 2)}, "expected keys"),
        ({"keys": KEYS.astype(np.float32), "importance": known(1, 2)}, "expected keys"),
        ({"keys": KEYS, "importance": known(1, np.nan)}, "expected finite float32, 0 or more"),
        ({"keys": KEYS, "importance": known(1, -1)}, "expected finite float32, 0 or more"),
        ({"keys": KEYS, "importance": KEYS[:, 0]}, "expected finite float32, 0 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_found_out_again(
    bundle: Bundle, tmp_path: Path, stored: dict[str, Array] | bytes, said: str
) -> None:
    """With a line that says why: nothing is known then."""
    write_tensors_to(tmp_path / "f", "importance", stored)
    sample = draw_sample(some_data(bundle, tmp_path), 0.5, tmp_path / "f", VAULT, rng())
    assert sample.notice.startswith("what this device knew of its examples' importance is lost: ")
    assert said in sample.notice
    assert np.isnan(sample.importance).all()


def test_a_file_under_another_storage_key_is_not_given_up(bundle: Bundle, tmp_path: Path) -> None:
    write_tensors_to(tmp_path / "f", "importance", {}, vault_of(key=StorageKey(bytes(32))))
    with pytest.raises(WrongStorageKeyError):
        draw_sample(some_data(bundle, tmp_path), 0.5, tmp_path / "f", VAULT, rng())


# a round


def asking(bundle: Bundle, share: float, **training: object) -> Plan:
    """For one pass over a share of the examples."""
    plan = make_plan(bundle, "AB")
    changed = msgspec.structs.replace(plan.training, steps=None, epochs=1, example_share=share, **training)
    return msgspec.structs.replace(plan, training=changed)


def run(job: TrainingJob) -> tuple[bytes, Done, list[Event]]:
    events: list[Event] = []
    frame, done = run_round(job, events.append)
    return frame, done, events


def test_a_round_trains_a_share_and_weighs_the_whole(bundle: Bundle, tmp_path: Path) -> None:
    """Ten of forty examples in two steps of eight; the device counts for forty; it knows ten examples then."""
    job, _ = make_job(tmp_path, bundle, asking(bundle, 0.25))
    _, done, events = run(job)
    assert (done.examples, done.weight, done.metrics.steps) == ((10, 40), 40, 2)
    assert len([event for event in events if isinstance(event, Stepped)]) == 2
    stored = tensors_in(tmp_path / IMPORTANCE_NAME, "importance")
    assert stored["keys"].shape == (10, 16)
    assert (stored["importance"] > 0).all()
    assert 0 < done.tokens < some_data(bundle, tmp_path).tokens


def test_the_next_round_goes_on_from_there(bundle: Bundle, tmp_path: Path) -> None:
    """It knows the examples of the first round, and those of its own."""
    job, _ = make_job(tmp_path, bundle, asking(bundle, 0.25))
    run(job)
    (tmp_path / IMPORTANCE_NAME).rename(tmp_path / "kept")
    again = msgspec.structs.replace(asking(bundle, 0.25), round=4)
    job, _ = make_job(tmp_path, bundle, again)
    _, _, events = run(msgspec.structs.replace(job, importance=str(tmp_path / "kept")))
    before, after = (tensors_in(tmp_path / name, "importance") for name in ("kept", IMPORTANCE_NAME))
    keys = [{key.tobytes() for key in stored["keys"]} for stored in (before, after)]
    assert keys[0] < keys[1]
    assert not [event for event in events if isinstance(event, Notice) and "importance" in event.text]


def test_a_damaged_file_is_told_of_and_the_round_goes_on(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"nothing that was encrypted")
    job, _ = make_job(tmp_path, bundle, asking(bundle, 0.25))
    _, done, events = run(msgspec.structs.replace(job, importance=str(tmp_path / "kept")))
    assert done.examples == (10, 40)
    assert len([event for event in events if isinstance(event, Notice) and "importance is lost" in event.text]) == 1


def test_a_round_that_asks_for_all_keeps_nothing(bundle: Bundle, tmp_path: Path) -> None:
    job, _ = make_job(tmp_path, bundle, make_plan(bundle, "AB"))
    _, done, _ = run(job)
    assert done.examples == (40, 40)
    assert done.tokens == some_data(bundle, tmp_path).tokens
    assert not (tmp_path / IMPORTANCE_NAME).exists()


def test_an_interrupted_round_finds_the_same(bundle: Bundle, tmp_path: Path) -> None:
    """Stopped before its last step, it ends with the values and the importance of one that was not."""
    job, signed = make_job(tmp_path, bundle, asking(bundle, 0.5))
    layout = WorkingBundle(bundle).plan_layout(signed.plan)
    whole, _, _ = run(job)
    wanted = tensors_in(tmp_path / IMPORTANCE_NAME, "importance")
    (tmp_path / IMPORTANCE_NAME).unlink()

    def interrupted_after(step: int | None) -> tuple[bytes, list[int]]:
        checkpoints = Checkpoints(tmp_path / "checkpoint", VAULT, job.round, every_s=1e9)
        steps: list[int] = []

        def said(event: Event) -> None:
            if isinstance(event, Stepped):
                steps.append(event.step)
                if event.step == step:
                    checkpoints.stop()

        return run_round(job, said, checkpoints=checkpoints)[0], steps

    with pytest.raises(StoppedError):
        interrupted_after(2)
    assert not (tmp_path / IMPORTANCE_NAME).exists()
    frame, steps = interrupted_after(None)
    assert steps == [3]
    found = tensors_in(tmp_path / IMPORTANCE_NAME, "importance")
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
    made, due = (decode_update(each, signed_plan=signed, layout=layout) for each in (frame, whole))
    np.testing.assert_array_equal(made.values, due.values)


def test_a_measurement_is_of_every_example(bundle: Bundle, tmp_path: Path) -> None:
    """Class means are those of all examples, whatever share is trained on later."""
    plan = msgspec.structs.replace(asking(bundle, 0.25), state="measure", head_alive=False)
    plan = msgspec.structs.replace(
        plan,
        update=UpdateRules(fraction_bits=24, max_abs=2.0**24, weight_cap=1, max_devices=4),
        modules=tuple(msgspec.structs.replace(module, alive="") for module in plan.modules),
    )
    whole = msgspec.structs.replace(plan, training=msgspec.structs.replace(plan.training, example_share=msgspec.UNSET))
    frames = []
    for asked in (plan, whole):
        job, _ = make_job(tmp_path, bundle, asked)
        frame, done, _ = run(job)
        assert done.weight == 40
        frames.append(len(frame))
    assert frames[0] == frames[1]
    assert not (tmp_path / IMPORTANCE_NAME).exists()
