"""Tiny real models, exported once a session for every test that needs a bundle.

Whatever takes torch to make is asked of the fixture ``made``. So the tests also run where there is no torch, on what
another run left in the folder of ``--made``; ``tests/targets`` does that for other Pythons and for ARM.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import pytest

import edge_runtime

# The limit of 200 ms an example says nothing about the code, and fails on a slow or busy machine.
hypothesis.settings.register_profile("untimed", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("untimed")

Made = Callable[[str, Callable[[Path], object]], Path]

LEFT_OUT = pytest.StashKey[list[pytest.Item]]()

LABELS = ("asyncio", "email", "tkinter", "xml")
WORDS = [f"word{i}" for i in range(40)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--made",
        type=Path,
        metavar="FOLDER",
        help="Where models, bundles and gradients that take torch to make are looked for, and kept once made.",
    )

    parser.addoption("--installed", action="store_true", help="Refuse to test a checkout instead of what is installed.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = []
    if config.getoption("--installed") and "site-packages" not in Path(edge_runtime.__file__).parts:
        raise pytest.UsageError(f"--installed: edge_runtime was imported from {edge_runtime.__file__}")


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items:
        items[0].config.stash[LEFT_OUT].extend(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name every test that was left out with ``-m`` and carries the reason for it."""
    for item in config.stash[LEFT_OUT]:
        reasons = [mark.args[0] for name in ("needs_torch", "not_emulated") for mark in item.iter_markers(name)]
        if reasons:
            terminalreporter.write_line(f"left out: {item.nodeid}: {'; '.join(reasons)}")


@pytest.fixture(scope="session")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``made(name, make)``: what ``make(path)`` wrote with torch's help, now or in an earlier run."""
    given: Path | None = request.config.getoption("--made")
    folder = given or tmp_path_factory.mktemp("made")
    folder.mkdir(parents=True, exist_ok=True)

    def get(name: str, make: Callable[[Path], object]) -> Path:
        path = folder / name
        if path.exists():
            return path
        if importlib.util.find_spec("torch") is None:
            # A run that was given a folder relies on it: to skip here would be to test nothing without a word.
            (pytest.fail if given else pytest.skip)(f"{name}: it takes torch to make, and there is none here")
        part = folder / f"part-{name}"
        make(part)
        return part.rename(path)

    return get


def save_tokenizer(folder: Path, *, special: dict[str, int]) -> int:
    """A word-level tokenizer with these special tokens; returns the vocabulary size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {**special, **{word: len(special) + index for index, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "[CLS]" in special:
        pairs = [(name, special[name]) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pairs)
        names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    else:
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return len(vocabulary)


def save_bert(folder: Path) -> None:
    """A random three-layer BERT classifier; no layer is square."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    size = save_tokenizer(folder, special={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        num_labels=len(LABELS),
        initializer_range=0.2,
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def save_llama(folder: Path) -> None:
    """A random three-layer Llama with grouped KV heads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = save_tokenizer(folder, special={"<s>": 0, "</s>": 1, "[UNK]": 2})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=56,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def export(model: Path, task: str, out: Path, *more: str) -> Path:
    """Export with rank 4 on every linear layer, by the command itself.

    In a process of its own: the exporter's sessions and the engine's global thread pool exclude each other.
    """
    command = [sys.executable, "-m", "edge_runtime.cli", "export", "--model", str(model), "--task", task]
    done = subprocess.run([*command, "--rank", "4", "--out", str(out), *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def bert_folder(made: Made) -> Path:
    """A random three-layer BERT classifier."""
    return made("bert-model", save_bert)


@pytest.fixture(scope="session")
def llama_folder(made: Made) -> Path:
    """A random three-layer Llama."""
    return made("llama-model", save_llama)


@pytest.fixture(scope="session")
def bert_bundle(bert_folder: Path, made: Made) -> Path:
    """The BERT's bundle: task classify, four labels, rank 4."""
    return made("bert-bundle", lambda out: export(bert_folder, "classify", out, "--labels", ",".join(LABELS)))


@pytest.fixture(scope="session")
def llama_bundle(llama_folder: Path, made: Made) -> Path:
    """The Llama's bundle: task lm, rank 4."""
    return made("llama-bundle", lambda out: export(llama_folder, "lm", out))
