"""peft folders: in as initial adapters, evaluated by peft, refused when a bundle cannot express them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from export_sessions import LABELS, Exported
from peft import LoraConfig, get_peft_model

from export import evaluate_adapter, export_bundle
from export.adapters import read_adapter
from export.commands import export, peft_eval
from export.errors import AdapterError, DataError
from export.quiet import quiet
from export.sources import find_source, load

TARGETS = ["query", "key", "value", "output.dense", "intermediate.dense"]
LOWER = "bert.encoder.layer.1.output.dense"


def _save(folder: Path, workshop: Path, **changes: Any) -> Any:
    """A peft adapter with random factors on the tiny BERT; returns the peft model."""
    settings = {"r": 5, "lora_alpha": 10, "target_modules": TARGETS, "rank_pattern": {LOWER: 2}, **changes}
    base = load(find_source(str(workshop / "bert")), "classify", len(LABELS)).model
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **settings)).eval()
        for name, value in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                torch.nn.init.normal_(value, std=0.3)
        model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(workshop / "bert")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "labels.json").write_text(json.dumps(LABELS))
    return model


@pytest.fixture
def adapter(workshop: Path, tmp_path: Path) -> Path:
    """A peft folder with a lower rank in one module."""
    _save(tmp_path / "adapter", workshop)
    return tmp_path / "adapter"


def test_peft_folder_becomes_the_initial_adapter(traced_bert: Exported, adapter: Path, tmp_path: Path) -> None:
    """Every product scale·B·A is the folder's, padded modules included, and the padding can learn."""
    options = replace(traced_bert.options, model=str(adapter), rank=None, labels=None, out=tmp_path / "bundle")
    export_bundle(options)
    from edge_runtime.bundle import open_bundle

    bundle, given = open_bundle(tmp_path / "bundle"), read_adapter(adapter)
    start = bundle.initial_adapter()
    assert (bundle.manifest.r_max, bundle.manifest.scale, bundle.manifest.labels) == (5, 2.0, LABELS)
    for name, (a, b) in given.factors.items():
        np.testing.assert_allclose(start[f"{name}.lora_b"] @ start[f"{name}.lora_a"], b @ a, rtol=1e-5, atol=1e-6)
    assert start[f"{LOWER}.lora_a"][2:].any()
    assert not start[f"{LOWER}.lora_b"][:, 2:].any()
    np.testing.assert_array_equal(start["classifier.weight"], given.head["classifier.weight"])


def test_scale_of_a_lower_rank_is_folded_into_b(adapter: Path) -> None:
    """peft scales the module of rank 2 by 10/2, the bundle all of them by 10/5."""
    from safetensors.numpy import load_file

    stored = load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{LOWER}.lora_B.weight"]
    np.testing.assert_allclose(read_adapter(adapter).factors[LOWER][1], stored * 2.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lora_dropout": 0.1}, "lora_dropout"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias")],
)
def test_what_a_bundle_cannot_express_is_refused(
    workshop: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """By its name in the configuration."""
    _save(tmp_path / "adapter", workshop, **changes)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "adapter")


def test_settings_beside_an_adapter_are_refused(bert: Exported, adapter: Path, tmp_path: Path) -> None:
    """The folder decides; two answers would be one too many."""
    with pytest.raises(AdapterError, match="sets rank, alpha and targets itself"):
        export_bundle(replace(bert.options, model=str(adapter), out=tmp_path / "bundle"))


def test_broken_folders_are_refused(adapter: Path) -> None:
    """Missing tensors, then a configuration that is none."""
    (adapter / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_adapter(adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="not a LoRA configuration"):
        read_adapter(adapter)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A few labelled texts."""
    rows = [("the sky is blue", "cold"), ("red is warm", "hot"), ("green", "mild")]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def test_peft_eval_classifies_as_peft_does(workshop: Path, tmp_path: Path, data: Path) -> None:
    """Loss and accuracy of the same model run by hand, one text at a time."""
    model = _save(tmp_path / "adapter", workshop)
    texts = ([2, 12, 13, 11, 8, 3], [2, 6, 11, 9, 3], [2, 7, 3])
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in texts])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2]))
    result = CliRunner().invoke(
        peft_eval,
        ["--model", str(workshop / "bert"), "--adapter", str(tmp_path / "adapter"), "--data", str(data), "--json"],
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["metric"], found["examples"]) == ("accuracy", 3)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found["value"] == pytest.approx(float((logits.argmax(1) == torch.arange(3)).float().mean()))


def test_peft_eval_measures_loss(workshop: Path, tmp_path: Path, data: Path) -> None:
    """Without labels.json: a fresh adapter leaves a random model near the uniform guess."""
    base = load(find_source(str(workshop / "llama")), "lm").model
    with quiet():
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
            tmp_path / "lm"
        )
    found = evaluate_adapter(str(workshop / "llama"), tmp_path / "lm", data)
    assert found.metric == "loss"
    assert found.value == found.loss
    assert 7 < np.exp(found.value) < 28
    assert found.examples > 3


def test_peft_eval_refuses_an_unknown_label(workshop: Path, adapter: Path, data: Path) -> None:
    """The manifest, here labels.json, owns the list."""
    data.write_text('{"text": "red", "label": "boiling"}\n')
    with pytest.raises(DataError, match="record 1: unknown label 'boiling'"):
        evaluate_adapter(str(workshop / "bert"), adapter, data)


def test_export_command_prints_one_json_object(
    traced_bert: Exported, workshop: Path, tmp_path: Path, data: Path
) -> None:
    """And nothing on stderr; labels come from the data."""
    command = ["--model", str(workshop / "bert"), "--task", "classify", "--labels-from", str(data), "--rank", "6"]
    result = CliRunner().invoke(export, [*command, "--seed", "3", "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["digest"] == traced_bert.report.digest
    assert report["verify"]["max_rel_err"] == max(case["max_rel_err"] for case in report["verify"]["cases"])
    assert result.stderr == ""


def test_export_command_tells_input_from_failure(
    traced_bert: Exported, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 for what the user can change, 1 for failed work; one line, no traceback."""
    out = ["--out", str(tmp_path / "out"), "--task", "classify"]
    wrong = CliRunner().invoke(export, ["--model", "nowhere", "--labels", "a,b", *out])
    assert (wrong.exit_code, len(wrong.stderr.splitlines())) == (2, 1)
    assert CliRunner().invoke(export, ["--model", "minilm"]).exit_code == 2
    monkeypatch.setattr("export.verify.TOLERANCE", 1e-12)
    command = ["--model", str(workshop / "bert"), "--labels", ",".join(LABELS), *out, "--json"]
    failed = CliRunner().invoke(export, command)
    assert (failed.exit_code, len(failed.stderr.splitlines())) == (1, 1)
    assert "relative error" in failed.stderr
    assert not (tmp_path / "out").exists()
