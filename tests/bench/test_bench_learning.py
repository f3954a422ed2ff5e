"""``bench.learning``: what is run, what is written and shown; and both sides on a tiny model, where they must agree."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from bench.errors import RequestError, UnavailableError
from bench.jsonl import append_line
from bench.learning import __main__ as command
from bench.learning.lesson import Setup, Watch, checkpoints, run
from bench.learning.lines import SYSTEMS, Key, Line, base_of, products_of, read_lines, rows_of, table
from bench.learning.picture import page
from bench.learning.tasks import RECIPES, Recipe, draw_adapter, ensure_start, write_examples
from edge_runtime.bundle import open_bundle
from edge_runtime.engine.runtime import start_runtime

LABELS = ("asyncio", "email", "tkinter", "xml")


def a_line(key: Key, final: float = 0.9) -> Line:
    curve = ((0, 0.1), (key.steps, final))
    return Line(
        key.task, key.system, key.seed, key.steps, "accuracy", curve, final, 12.5, {"cpu": "x"}, "abc", key.quick
    )


def write_data(tmp_path: Path) -> None:
    """Both data sets in their layout: two intents of 400 queries a split, and one short and one long problem."""
    queries = {
        split: [[f"{split} {label} {i}", label] for label in "ab" for i in range(400)] for split in ("train", "val")
    }
    (tmp_path / "text_clinc150").mkdir()
    (tmp_path / "text_clinc150" / "data_full.json").write_text(json.dumps(queries))
    problems = [{"question": "How many?", "answer": "1+1 = 2\n#### 2"}, {"question": "q" * 400, "answer": "1"}]
    (tmp_path / "lm_gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "lm_gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))


def test_a_training_is_one_line(tmp_path: Path) -> None:
    """The fields that the issue asks for, by these names."""
    text = append_line(tmp_path / "results.jsonl", a_line(Key("clinc150", "peft", 0, 200, False)))
    assert (tmp_path / "results.jsonl").read_text() == text + "\n"
    names = "task system seed steps metric curve final train_s host commit quick"
    assert list(json.loads(text)) == names.split()
    assert json.loads(text)["curve"] == [[0, 0.1], [200, 0.9]]


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    """Nor what a quick run left for a whole one; the order is seed by seed, so that whole comparisons come first."""
    path = tmp_path / "results.jsonl"
    append_line(path, a_line(Key("clinc150", "emberlora-fp32", 0, 200, False), 0.8))
    append_line(path, a_line(Key("clinc150", "peft", 0, 20, True)))
    wanted = command.wanted_keys(("clinc150",), ("peft", "emberlora-fp32"), (0, 1), quick=False)
    assert [(key.seed, key.system) for key in wanted][:3] == [(0, "peft"), (0, "emberlora-fp32"), (1, "peft")]
    taught: list[Key] = []

    def teach(key: Key) -> Line:
        taught.append(key)
        return a_line(key)

    lines = command.complete(path, wanted, teach, lambda _: None)
    assert taught == [wanted[0], wanted[2], wanted[3]]
    assert [line.key for line in lines] == wanted
    assert lines[1].final == 0.8
    command.complete(path, wanted, teach, lambda _: None)
    assert len(taught) == 3


def test_a_run_that_was_killed_leaves_no_half_line(tmp_path: Path) -> None:
    """The half is not read, and the next line takes its place; a broken whole line is named."""
    path = tmp_path / "results.jsonl"
    keys = [Key("gsm8k", "peft", seed, 200, False) for seed in (0, 1)]
    text = append_line(path, a_line(keys[0]))
    path.write_text(text + "\n" + text[:40])
    assert [line.key for line in read_lines(path)] == keys[:1]
    append_line(path, a_line(keys[1]))
    assert [line.key for line in read_lines(path)] == keys
    path.write_text("{}\n")
    with pytest.raises(RequestError, match=r"results\.jsonl: line 1: not a result"):
        read_lines(path)


def test_a_training_that_fails_is_left_out(tmp_path: Path) -> None:
    """It is said, and what can be run is run."""
    wanted = [Key("clinc150", system, 0, 200, False) for system in ("peft", "emberlora-int4", "emberlora-fp32")]
    told: list[str] = []

    def teach(key: Key) -> Line:
        if key.system == "emberlora-int4":
            raise UnavailableError("export of clinc150, base int4: no")
        return a_line(key)

    lines = command.complete(tmp_path / "results.jsonl", wanted, teach, told.append)
    assert [line.key for line in lines] == [wanted[0], wanted[2]]
    assert "left out: export of clinc150, base int4: no" in told


def test_a_failed_export_is_not_tried_for_the_next_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command ends with 1 and the count; no picture of nothing is drawn."""
    tried: list[object] = []

    def refuse(*given: object) -> Path:
        tried.append(given)
        raise UnavailableError("export of gsm8k, base int4: no")

    write_data(tmp_path)
    monkeypatch.setattr(command, "ensure_bundle", refuse)
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--task", "gsm8k"]
    done = CliRunner().invoke(command.main, [*arguments, "--system", "emberlora-int4"])
    assert (done.exit_code, len(tried)) == (1, 1)
    assert done.output.count("left out: export of gsm8k, base int4: no") == 3
    assert "3 of 3 trainings failed" in done.output
    assert not (tmp_path / "out" / "learning.html").exists()


def test_the_difference_is_of_the_same_seeds() -> None:
    """A seed that only one side has counts in its mean and not in the difference."""
    keys = [Key("clinc150", "peft", seed, 200, False) for seed in (0, 1)]
    lines = [a_line(keys[0], 0.80), a_line(keys[1], 0.90)]
    for seed, final in ((0, 0.83), (1, 0.88), (2, 0.10)):
        lines.append(a_line(Key("clinc150", "emberlora-int4", seed, 200, False), final))
    peft, ours = rows_of(lines, "clinc150")
    assert (peft.final, peft.difference, peft.largest) == (pytest.approx(0.85), 0, 0)
    assert (ours.seeds, ours.final) == (3, pytest.approx((0.83 + 0.88 + 0.10) / 3))
    assert (ours.difference, ours.largest) == (pytest.approx(0.005), pytest.approx(0.03))
    assert "emberlora-int4            3    0.6033   +0.0050    0.0300" in table(lines)
    assert "–" in table(lines[2:])


def test_the_picture_has_every_system_and_the_differences() -> None:
    """A panel a task, one name a system, and the same table."""
    lines = [
        a_line(Key(task, system, seed, 200, False), 0.9 + 0.01 * seed)
        for task in RECIPES
        for system in SYSTEMS
        for seed in (0, 1)
    ]
    text = page(lines)
    assert all(f"<td>{system}</td><td>2</td><td>0.9050</td><td>+0.0000</td>" in text for system in SYSTEMS)
    assert text.count("<h2>") == 2
    assert "https://cdn" not in text.split("</script>")[-1]


def test_systems_name_their_bundle() -> None:
    found = {system: (base_of(system), products_of(system)) for system in SYSTEMS}
    assert found["peft"] == ("fp32", "exact")
    assert found["emberlora-int4"] == ("int4", "exact")
    assert found["emberlora-int8-fast"] == ("int8", "int8")
    assert found["emberlora-fp32-fast"] == ("fp32", "int8")


def test_a_curve_ends_at_the_last_step() -> None:
    assert checkpoints(200) == (0, 25, 50, 100, 150, 200)
    assert checkpoints(20) == (0, 10, 20)
    assert checkpoints(120) == (0, 25, 50, 100, 120)


def test_the_clock_stands_still_while_measuring() -> None:
    """What measuring takes is in no step's time."""
    now = [0.0]

    def measure() -> float:
        now[0] += 1000.0
        return now[0]

    watch = Watch(measure, (0, 2), clock=lambda: now[0])
    for step in range(4):
        watch.after(step)
        now[0] += 3.0
    assert watch.train_s == 9.0
    assert watch.curve == [(0, 1000.0), (2, 2006.0)]


def test_examples_are_held_out(tmp_path: Path) -> None:
    """CLINC150: as many of every intent; GSM8K: short problems, only the answer is a completion."""
    write_data(tmp_path)
    files = write_examples(RECIPES["clinc150"], tmp_path, tmp_path / "out", quick=False)
    held_out = [json.loads(line) for line in files.held_out.read_text().splitlines()]
    assert [sum(record["label"] == label for record in held_out) for label in "ab"] == [300, 300]
    assert all(record["text"].startswith("val") for record in held_out)
    assert len(files.train.read_text().splitlines()) == 800
    files = write_examples(RECIPES["gsm8k"], tmp_path, tmp_path / "out", quick=True)
    record = {"prompt": "Question: How many?\nAnswer:", "completion": " 1+1 = 2\n#### 2"}
    assert [json.loads(line) for line in files.train.read_text().splitlines()] == [record]


def test_a_folder_without_the_data_is_bad_usage(tmp_path: Path) -> None:
    """One line that names the folder and the task, exit code 2, and no file of results."""
    told = CliRunner().invoke(command.main, ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--quick"])
    assert told.exit_code == 2
    assert f"{tmp_path}: not the data of task clinc150: FileNotFoundError" in told.output
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_the_adapter_at_the_start_depends_on_the_seed_alone(bert_bundle: Path, tmp_path: Path) -> None:
    """A within peft's bounds, B zero, the head small; and written once."""
    bundle = open_bundle(bert_bundle)
    one, same, other = (
        draw_adapter(bundle.manifest, bundle.initial_adapter(), np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert all(np.array_equal(one[name], same[name]) for name in bundle.initial_adapter())
    module = bundle.manifest.modules[0]
    assert not np.array_equal(one[f"{module.name}.lora_a"], other[f"{module.name}.lora_a"])
    bound = 1 / np.sqrt(module.in_features)
    assert 0.8 * bound < np.abs(one[f"{module.name}.lora_a"]).max() <= bound
    assert not one[f"{module.name}.lora_b"].any()
    assert 0 < np.abs(one["classifier.weight"]).max() < 0.1
    assert not one["classifier.bias"].any()
    folder = ensure_start(bert_bundle, tmp_path / "start", 1)
    written = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    assert ensure_start(bert_bundle, folder, 2) == folder
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_both_sides_learn_the_same(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Twelve steps on a tiny model with padding: the same metric at every checkpoint, and it got better."""
    bundle, model = request.getfixturevalue(f"{kind}_bundle"), request.getfixturevalue(f"{kind}_folder")
    recipe = Recipe(kind, str(model), "classify", "accuracy", 8, 10, 1e-2, 1e-2, 0, 0)
    rng = np.random.default_rng(0)
    records = []
    for _ in range(64):
        label = int(rng.integers(4))
        text = " ".join(f"word{10 * label + int(word)}" for word in rng.integers(0, 10, size=rng.integers(2, 12)))
        records.append({"text": text, "label": LABELS[label]})
    if kind == "llama":
        recipe = msgspec.structs.replace(recipe, task="lm", metric="loss", lr_head=0.0)
        records = [
            {"prompt": r["text"], "completion": f"{r['text'].split()[0]} {r['text'].split()[-1]}"} for r in records
        ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    start = ensure_start(bundle, tmp_path / "start", 0)
    files = (str(model), str(bundle), str(start), str(data), str(data))
    peft, ours = (run(Setup(recipe, system, 0, 12, start_runtime(), *files)) for system in ("peft", "emberlora-fp32"))
    assert [step for step, _ in ours.curve] == [0, 6, 12]
    for (_, found), (_, wanted) in zip(ours.curve, peft.curve, strict=True):
        assert found == pytest.approx(wanted, abs=1 / 64 if recipe.metric == "accuracy" else 1e-3)
    gained = ours.curve[-1][1] - ours.curve[0][1]
    assert gained > 0.2 if recipe.metric == "accuracy" else gained < -0.5
