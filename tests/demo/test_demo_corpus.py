"""The demo's texts: repeatable, without overlap, uneven between devices."""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cloud.demo.corpus import MAX_SHARE, Example, Split, collect, deal, docstrings, functions_of, split
from cloud.demo.errors import CorpusError

PACKAGES = 8


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return collect(Path(sysconfig.get_path("stdlib")), task="classify", packages=PACKAGES)


def cut(examples: list[Example], seed: int = 0) -> Split:
    return split(examples, heldout_share=0.2, rng=np.random.default_rng(seed))


def test_every_python_carries_enough(examples: list[Example]) -> None:
    """Eight packages and enough docstrings, none of them in two packages."""
    texts = cut(examples)
    assert len(texts.labels) == PACKAGES
    assert len(texts.train) > 800
    assert max(Counter(example.text for example in examples).values()) == 1


def test_the_same_seed_gives_the_same_texts(examples: list[Example]) -> None:
    assert cut(examples) == cut(list(reversed(examples)))
    assert cut(examples) != cut(examples, seed=1)


def test_nothing_held_out_is_trained(examples: list[Example]) -> None:
    texts = cut(examples)
    assert {example.text for example in texts.train}.isdisjoint(example.text for example in texts.heldout)
    assert {example.label for example in texts.heldout} == set(texts.labels)


def test_no_package_dominates(examples: list[Example]) -> None:
    texts = cut(examples)
    everything = texts.train + texts.heldout
    largest = max(Counter(example.label for example in everything).values())
    assert largest <= MAX_SHARE * len(everything)


def test_every_text_goes_to_one_device(examples: list[Example]) -> None:
    hands = deal(examples, devices=4, home_share=0.7, rng=np.random.default_rng(0))
    assert sorted(example for hand in hands for example in hand) == sorted(examples)


def test_devices_hold_other_packages_mostly(examples: list[Example]) -> None:
    """Each package has one device with most of it, and the devices are about equally large."""
    hands = deal(examples, devices=4, home_share=0.7, rng=np.random.default_rng(0))
    counts = [Counter(example.label for example in hand) for hand in hands]
    for label in {example.label for example in examples}:
        held = sorted(count[label] for count in counts)
        assert held[-1] >= 0.7 * sum(held)
    homes = {max(range(4), key=lambda device: counts[device][label]) for label in counts[0]}
    assert homes == set(range(4))
    assert max(map(len, hands)) < 2 * min(map(len, hands))


def library(folder: Path, **sources: str) -> Path:
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return folder


def test_a_text_of_two_packages_is_dropped(tmp_path: Path) -> None:
    shared = "A text of ten words or more, standing in both of these modules."
    own = {name: f"A text of ten words or more, only in the module {name}." for name in ("one", "two")}
    modules = {name: f'"""{shared}"""\ndef f():\n    """{text}"""' for name, text in own.items()}
    found = collect(library(tmp_path, **modules, broken="def f(:"), task="classify", packages=8)
    assert found == [Example(text, name) for name, text in own.items()]


def test_a_library_without_texts_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="expected texts in at least 2 packages"):
        collect(library(tmp_path, one="x = 1"), task="classify", packages=8)


def test_short_docstrings_are_left_out() -> None:
    module = ast.parse('"""Too short."""\nclass A:\n    """Long enough to say what this class is and what it does."""')
    assert list(docstrings(module)) == ["Long enough to say what this class is and what it does."]


def test_functions_come_without_their_indentation() -> None:
    source = "class A:\n    def f(self):\n        x = 1\n        y = 2\n        return x + y\n"
    assert list(functions_of(source)(ast.parse(source))) == ["def f(self):\n    x = 1\n    y = 2\n    return x + y"]
