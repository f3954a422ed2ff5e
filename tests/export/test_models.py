"""Finding models, blocks, targets and text settings, and refusing what is not known."""

from __future__ import annotations

from pathlib import Path

import export_models
import pytest
import torch
from torch import nn

from export.blocks import find_blocks
from export.errors import ModelError
from export.heads import find_head
from export.lora import find_slots, peft_targets
from export.quiet import quiet
from export.sources import find_source, load
from export.text import encode, plain_tokenizer, text_info


@pytest.fixture(scope="module")
def llama(workshop: Path) -> object:
    """The tiny Llama, loaded."""
    return load(find_source(str(workshop / "llama")), "lm")


def test_unknown_model_is_refused(tmp_path: Path) -> None:
    """The message says what would be one."""
    with pytest.raises(ModelError, match="expected one of minilm, smollm2 or a folder"):
        find_source(str(tmp_path / "nowhere"))


def test_name_in_the_manifest_is_no_path(workshop: Path) -> None:
    """A bundle must not tell where it was made."""
    assert find_source(str(workshop / "llama")).name == "llama"


def test_model_without_blocks_is_refused(llama: object) -> None:
    """Nothing of the depth the configuration states."""
    model = llama.model  # type: ignore[attr-defined]  # torch types are Any
    bare = nn.Module()
    bare.config = model.config
    with pytest.raises(ModelError, match="no blocks found"):
        find_blocks(bare)


def test_task_must_fit_the_model(workshop: Path) -> None:
    """A decoder does not classify here, and an encoder does not predict the next token."""
    with pytest.raises(ModelError):
        find_head(load(find_source(str(workshop / "llama")), "classify", 3).model, "classify")
    with pytest.raises(ModelError):
        find_head(load(find_source(str(workshop / "bert")), "lm").model, "lm")


def test_missing_weights_are_refused(workshop: Path, tmp_path: Path) -> None:
    """A random pooler would train, and differ on every machine."""
    from safetensors.torch import load_file, save_file

    with quiet():
        export_models.bert(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    tensors = {name: value for name, value in load_file(path).items() if "pooler" not in name}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="pooler"):
        load(find_source(str(tmp_path / "bert")), "classify", 3)


def test_targets_are_suffixes(llama: object) -> None:
    """As in peft: a last name, or the end of a path."""
    block = find_blocks(llama.model)[1][0]  # type: ignore[attr-defined]
    assert [slot.name for slot in find_slots(block, ("v_proj", "mlp.up_proj"))] == ["self_attn.v_proj", "mlp.up_proj"]
    assert len(find_slots(block, ("all-linear",))) == 7
    assert find_slots(block, ("proj",)) == ()


def test_peft_targets_find_exactly_the_modules() -> None:
    """A suffix that names more than is wanted is made longer."""
    tree = nn.ModuleDict(
        {"a": nn.ModuleDict({"dense": nn.Linear(2, 2)}), "b": nn.ModuleDict({"dense": nn.Linear(2, 2)})}
    )
    assert peft_targets(tree, ["a.dense", "b.dense"]) == ("dense",)
    assert peft_targets(tree, ["a.dense"]) == ("a.dense",)


def test_text_is_framed_and_cut(llama: object) -> None:
    """A classifier's prefix and suffix survive the cut; a language model's suffix does not, as on devices."""
    loaded = llama
    text = text_info(loaded.tokenizer, loaded.model.config, "lm", 5)  # type: ignore[attr-defined]
    tokenizer, sky = plain_tokenizer(loaded.tokenizer), "the sky is blue red"  # type: ignore[attr-defined]
    assert encode(tokenizer, text, sky, task="classify") == [4, 12, 13, 11, 5]
    assert encode(tokenizer, text, sky, task="lm")[:4] == [4, 12, 13, 11]
    assert 5 not in encode(tokenizer, text, sky, task="lm")
    assert encode(tokenizer, text, "the sky", task="lm")[-1] == 5
    with pytest.raises(ModelError, match="max tokens"):
        text_info(loaded.tokenizer, loaded.model.config, "lm", 2)  # type: ignore[attr-defined]


def test_loading_leaves_torchs_generator_alone(workshop: Path) -> None:
    """A caller's random numbers do not depend on what was loaded."""
    before = torch.random.get_rng_state()
    load(find_source(str(workshop / "bert")), "classify", 5)
    assert torch.equal(before, torch.random.get_rng_state())
