"""``emberlora edge train``, ``eval`` and ``predict`` as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_runtime.cli import main
from edge_runtime.engine.model import BlockEngine

DATA = Path(os.environ.get("EMBERLORA_DATA", Path(__file__).parents[4] / "shared" / "data"))
LABELS = ("asyncio", "email", "tkinter", "xml")


def emberlora(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts whose words tell their label."""
    records = [{"text": f"word{i % 4 * 10} word{i % 4 * 10 + i % 7}", "label": LABELS[i % 4]} for i in range(80)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Texts for a language model: the words always follow each other in the same order."""
    path = tmp_path / "texts.jsonl"
    lines = [{"text": " ".join(f"word{(i + j) % 20}" for j in range(12))} for i in range(60)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.needs_torch("peft loads the adapter that was trained here")
def test_train_learns_and_writes_what_peft_loads(
    bert_bundle: Path, bert_folder: Path, data: Path, tmp_path: Path
) -> None:
    """Accuracy rises to one, eval agrees, and transformers + peft with the folder give the same predictions."""
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = tmp_path / "adapter"
    done = emberlora(
        *("edge", "train", "--bundle", bert_bundle, "--data", data, "--eval", data, "--out", out, "--json"),
        *("--epochs", 6, "--lr-a", 1e-2, "--lr-b", 1e-2, "--lr-head", 1e-2),
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["steps"] == 30
    assert result["before"]["value"] < 0.6 < 0.95 <= result["eval"]["value"]
    again = emberlora("edge", "eval", "--bundle", bert_bundle, "--adapter", out, "--data", data, "--json")
    assert json.loads(again.stdout) == result["eval"]

    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=len(LABELS))
    model = PeftModel.from_pretrained(base, out).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    records = [json.loads(line) for line in data.read_text().splitlines()]
    with torch.no_grad():
        encoded = tokenizer([record["text"] for record in records], return_tensors="pt", padding=True)
        encoded.pop("token_type_ids", None)
        chosen = model(**encoded).logits.argmax(1).tolist()
    accuracy = sum(LABELS[c] == record["label"] for c, record in zip(chosen, records, strict=True)) / len(records)
    assert accuracy == pytest.approx(result["eval"]["value"], abs=1e-9)


def test_training_goes_on_from_an_adapter(bert_bundle: Path, data: Path, tmp_path: Path) -> None:
    """--adapter starts where an earlier training ended."""
    common = ("edge", "train", "--bundle", bert_bundle, "--data", data, "--eval", data, "--json", "--steps", 8)
    first = json.loads(emberlora(*common, "--out", tmp_path / "a").stdout)
    second = json.loads(emberlora(*common, "--out", tmp_path / "b", "--adapter", tmp_path / "a").stdout)
    assert second["before"] == first["eval"]


def test_less_memory_same_result(bert_bundle: Path, data: Path, tmp_path: Path) -> None:
    """Recomputing everything learns the same."""
    common = ("edge", "train", "--bundle", bert_bundle, "--data", data, "--json", "--steps", 6)
    kept = json.loads(emberlora(*common, "--out", tmp_path / "a").stdout)
    recomputed = json.loads(emberlora(*common, "--out", tmp_path / "b", "--memory-budget-mb", 0).stdout)
    assert recomputed["loss_end"] == pytest.approx(kept["loss_end"], rel=1e-4)


def test_still_modules_are_left_out_and_counted(bert_bundle: Path, data: Path, tmp_path: Path) -> None:
    """Without the option none is; the highest share leaves out most, and the adapter still loads."""
    common = ("edge", "train", "--bundle", bert_bundle, "--data", data, "--json", "--epochs", 3)
    plain = json.loads(emberlora(*common, "--out", tmp_path / "a").stdout)
    killed = json.loads(emberlora(*common, "--out", tmp_path / "b", "--local-kill", 1).stdout)
    assert plain["skipped"] == 0
    assert killed["skipped"] > 50
    assert killed["steps"] == plain["steps"]
    evaluated = emberlora("edge", "eval", "--bundle", bert_bundle, "--adapter", tmp_path / "b", "--data", data)
    assert evaluated.exit_code == 0


def test_packed_weights_learn_the_same(
    bert_bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option reaches the engine, which packs every block."""
    made: list[BlockEngine] = []

    class Noted(BlockEngine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr("edge_runtime.training.session.BlockEngine", Noted)
    common = ("edge", "train", "--bundle", bert_bundle, "--data", data, "--json", "--steps", 6)
    mapped = json.loads(emberlora(*common, "--out", tmp_path / "a").stdout)
    packed = json.loads(emberlora(*common, "--out", tmp_path / "b", "--packed-weights").stdout)
    assert packed["loss_end"] == pytest.approx(mapped["loss_end"], rel=1e-4)
    assert [len(engine._packed) > 0 for engine in made] == [False, True]


def test_pieces_of_a_batch_learn_the_same(bert_bundle: Path, data: Path, tmp_path: Path) -> None:
    """However many tokens go through the model at once."""
    common = ("edge", "train", "--bundle", bert_bundle, "--data", data, "--json", "--steps", 6)
    whole = json.loads(emberlora(*common, "--out", tmp_path / "a").stdout)
    pieces = json.loads(emberlora(*common, "--out", tmp_path / "b", "--micro-tokens", 8).stdout)
    assert pieces["loss_end"] == pytest.approx(whole["loss_end"], rel=1e-4)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() != (
        tmp_path / "b" / "adapter_model.safetensors"
    ).read_bytes()  # it was divided: the last bits of the sums differ


def test_language_model_learns_and_continues(llama_bundle: Path, texts: Path, tmp_path: Path) -> None:
    """The loss falls, and predict continues a text deterministically."""
    out = tmp_path / "adapter"
    common = ("edge", "train", "--bundle", llama_bundle, "--data", texts, "--eval", texts, "--out", out, "--json")
    done = emberlora(*common, "--epochs", 6, "--lr-a", 1e-2, "--lr-b", 1e-2)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["eval"]["metric"] == "loss"
    assert result["eval"]["loss"] < 0.8 * result["before"]["loss"]
    ask = ("edge", "predict", "--bundle", llama_bundle, "--adapter", out, "--text", "word3 word4", "--json")
    one, two = emberlora(*ask, "--max-new-tokens", 5), emberlora(*ask, "--max-new-tokens", 5)
    assert one.stdout == two.stdout
    assert json.loads(one.stdout)["continuation"]


def test_predict_keeps_the_order_of_the_file(bert_bundle: Path, tmp_path: Path) -> None:
    """Texts of different lengths are batched by length but answered in order, with probabilities that sum to one."""
    path = tmp_path / "texts.jsonl"
    texts = [" ".join(["word1"] * (1 + (i * 7) % 13)) for i in range(40)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    lines = [
        json.loads(line)
        for line in emberlora("edge", "predict", "--bundle", bert_bundle, "--data", path, "--json").stdout.splitlines()
    ]
    assert [line["index"] for line in lines] == list(range(40))
    single = json.loads(emberlora("edge", "predict", "--bundle", bert_bundle, "--text", texts[7], "--json").stdout)
    assert lines[7]["probabilities"] == pytest.approx(single["probabilities"], abs=1e-5)
    assert sum(lines[0]["probabilities"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--bundle", "nowhere"), "not a bundle"),
        (("--steps", 3, "--epochs", 2), "--epochs and --steps: give one of them"),
        (("--lr-a", "nan"), "--lr-a: expected a number from 0"),
        (("--local-kill", 0), "--local-kill: expected more than 0 and at most 1, got 0.0"),
        (("--local-kill", "nan"), "--local-kill: expected more than 0"),
        (("--max-tokens", 4000), "max_tokens"),
        (("--adapter", "."), "adapter_model.safetensors"),
        (("--batch-size", 0), "--batch-size"),
        (("--micro-tokens", 0), "--micro-tokens"),
    ],
)
def test_bad_input_is_one_clear_line(
    bert_bundle: Path, data: Path, tmp_path: Path, change: tuple[object, ...], message: str
) -> None:
    """Exit code 2, the reason on standard error, nothing written."""
    base = ("edge", "train", "--bundle", bert_bundle, "--data", data, "--out", tmp_path / "out")
    done = emberlora(*base, *change)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_diverging_training_fails_with_advice(bert_bundle: Path, data: Path, tmp_path: Path) -> None:
    """A loss that is no longer finite ends with 1 and says what to lower."""
    done = emberlora(
        *("edge", "train", "--bundle", bert_bundle, "--data", data, "--out", tmp_path / "out", "--steps", 40),
        *("--lr-a", 1e30, "--lr-b", 1e30, "--lr-head", 1e30),
    )
    assert done.exit_code == 1
    assert "lower the learning rates" in done.stderr
    assert not (tmp_path / "out").exists()


def test_interrupt_keeps_what_was_learned(bert_bundle: Path, data: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle writes the adapter as it is and exits with 130."""
    command = [sys.executable, "-m", "edge_runtime.cli", "edge", "train", "--bundle", str(bert_bundle)]
    command += ["--data", str(data), "--out", str(tmp_path / "out"), "--steps", "100000", "--json"]
    for begin_s in (4, 16, 64, 256):  # an interrupt before it trains ends otherwise; an emulated board takes its time
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            time.sleep(begin_s)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=8 * begin_s)
        if process.returncode == 130:
            break
    assert process.returncode == 130
    assert json.loads(out)["interrupted"] is True
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def export_stories(out: Path) -> None:
    command = [sys.executable, "-m", "edge_runtime.cli", "export", "--model", str(DATA / "model_stories260k")]
    subprocess.run([*command, "--task", "lm", "--rank", "8", "--out", str(out)], check=True, capture_output=True)


@pytest.fixture
def stories_bundle(made: Any) -> Path:
    """stories260k, rank 8."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA.name} (EMBERLORA_DATA)")
    return made("stories-bundle", export_stories)  # type: ignore[no-any-return]  # conftest's types cannot be imported


@pytest.mark.not_emulated("takes twenty minutes there, for what the tiny models show as well")
def test_a_real_model_learns_from_real_speakers(stories_bundle: Path, tmp_path: Path) -> None:
    """stories260k, a real trained Llama, on Shakespeare's speakers: the held-out loss falls."""
    speakers = [json.loads(line) for line in (DATA / "lm_shakespeare" / "speakers.jsonl").read_text().splitlines()]
    lines = [text for speaker in speakers[:20] for text in speaker["lines"][:20]]
    for name, part in (("train", lines[: len(lines) * 4 // 5]), ("held-out", lines[len(lines) * 4 // 5 :])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in part))
    done = emberlora(
        *("edge", "train", "--bundle", stories_bundle, "--data", tmp_path / "train.jsonl", "--json"),
        *("--eval", tmp_path / "held-out.jsonl", "--out", tmp_path / "adapter", "--steps", 60, "--max-tokens", 128),
    )
    result = json.loads(done.stdout)
    assert result["eval"]["loss"] < result["before"]["loss"] - 0.5


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_no_published_adapter_is_one_clear_line(data: Path, tmp_path: Path, command: str) -> None:
    """Before a task is finished the device's folder holds no adapter; the line says when it will."""
    done = emberlora("edge", command, "--home", tmp_path / "home", "--data", data)
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert "no published adapter: it arrives when the task is finished" in done.stderr
