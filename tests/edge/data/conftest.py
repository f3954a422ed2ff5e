"""A tokenizer of whole words, and bundles' ways to use it.

Token ids: 0 [PAD], 1 [UNK], 2 [CLS], 3 [SEP], 4 <s>, 5 </s>, 6 <|start|>, 7 <|end|>, 8 system, 9 user, 10 assistant,
then ``w0`` … ``w99`` from :data:`FIRST_WORD` on. The file also stores padding, truncation and a post-processor, none
of which may ever be used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from edge_runtime.bundle import Chat, ChatRole, Text
from edge_runtime.data import TextEncoder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", "<|start|>", "<|end|>"]
ROLES = ["system", "user", "assistant"]
WORDS = [f"w{index}" for index in range(100)]
LABELS = ("joy", "anger", "calm")

CHAT = Chat(
    roles={role: ChatRole(before=f"<|start|>{role} ", after="<|end|>\n") for role in ROLES},
    preamble="<|start|>system w99<|end|>\n",
)

MakeEncoder = Callable[..., TextEncoder]
WriteFile = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocab = {word: index for index, word in enumerate([*SPECIAL, *ROLES, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer.enable_padding(length=7)
    tokenizer.enable_truncation(max_length=3)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def classifier(tokenizer_file: Path) -> MakeEncoder:
    """``[CLS] text [SEP]``, 12 tokens at most."""

    def make(max_tokens: int | None = None) -> TextEncoder:
        text = Text(max_tokens=12, vocab_size=111, pad_id=0, prefix_ids=(2,), suffix_ids=(3,))
        return TextEncoder(tokenizer_file, text, task="classify", labels=LABELS, max_tokens=max_tokens)

    return make


@pytest.fixture(scope="session")
def writer(tokenizer_file: Path) -> MakeEncoder:
    """A language model, ``<s> text </s>`` unless told otherwise, 40 tokens at most, with a chat template."""

    def make(
        max_tokens: int | None = None,
        *,
        prefix: tuple[int, ...] = (4,),
        suffix: tuple[int, ...] = (5,),
        chat: Chat | None = CHAT,
    ) -> TextEncoder:
        text = Text(max_tokens=40, vocab_size=111, pad_id=0, prefix_ids=prefix, suffix_ids=suffix, chat=chat)
        return TextEncoder(tokenizer_file, text, task="lm", max_tokens=max_tokens)

    return make


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    """Write a data file: its name, then its lines or its bytes."""

    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make
