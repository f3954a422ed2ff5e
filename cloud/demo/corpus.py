"""Real text that every Python carries: docstrings, or source, of its standard library.

Nothing is imported and nothing downloaded: files are read and parsed. A docstring's label is the top-level package or
module it comes from. The text is left as it is, so some docstrings name their own package, as text does.

Rules: a text that stands in two packages is dropped everywhere; no package gives more than ``MAX_SHARE`` of what is
kept; the same Python and seed give the same corpus.
"""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cloud.demo.errors import CorpusError

# Not what the library says of itself: tests, data, other projects, and examples.
EXCLUDED = frozenset(
    {"distutils", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "pydoc_data", "test", "turtledemo"}
)
FOREIGN = frozenset({"site-packages", "dist-packages", "this"})
INNER_EXCLUDED = frozenset({"__pycache__", "test", "tests"})
# Modules whose Python text stands under a private name, because an accelerated twin has the public one.
PUBLIC_NAMES = {"_pydatetime": "datetime", "_pydecimal": "decimal", "_pyio": "io"}
MIN_WORDS = 10  # "Return the name." may come from anywhere
MAX_CHARS = 2_000  # a device reads 64 tokens; more is only disk and traffic
MAX_SHARE = 0.2
MAX_FUNCTION_LINES = 60
MIN_FUNCTION_LINES = 4


class Example(NamedTuple):
    """One text and the package it comes from."""

    text: str
    label: str


class Split(NamedTuple):
    """Texts to train on and texts held out; no text is in both."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The packages, sorted."""
        return tuple(sorted({example.label for example in self.train}))


def docstrings(module: ast.Module) -> Iterator[str]:
    """Every docstring of a module, its classes and functions."""
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text.split()) >= MIN_WORDS:
                yield text[:MAX_CHARS]


def functions_of(source: str) -> Callable[[ast.Module], Iterator[str]]:
    """What takes the source of every function of moderate length out of ``source``."""
    lines = source.splitlines()

    def functions(module: ast.Module) -> Iterator[str]:
        for node in ast.walk(module):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                text = lines[node.lineno - 1 : node.end_lineno]
                if MIN_FUNCTION_LINES <= len(text) <= MAX_FUNCTION_LINES:
                    indent = len(text[0]) - len(text[0].lstrip())
                    yield "\n".join(line[indent:] if not line[:indent].strip() else line for line in text)

    return functions


def collect(stdlib: Path, *, task: str, packages: int) -> list[Example]:
    """The texts of the ``packages`` packages that have most of them, sorted.

    Args:
        stdlib: Folder of a standard library.
        task: ``classify`` for docstrings, ``lm`` for source.
        packages: How many packages; fewer when the library has fewer.

    Raises:
        CorpusError: fewer than two packages have texts.
    """
    texts = {name: set(_texts(files, task)) for name, files in _packages(stdlib).items()}
    owners = Counter(text for found in texts.values() for text in found)
    unique = {name: sorted(text for text in found if owners[text] == 1) for name, found in texts.items()}
    largest = sorted(unique, key=lambda name: (-len(unique[name]), name))[:packages]
    kept = [Example(text, name) for name in sorted(largest) for text in unique[name]]
    if len({example.label for example in kept}) < 2:
        raise CorpusError(f"{stdlib}: no standard library to learn from: expected texts in at least 2 packages")
    return kept


def split(examples: Iterable[Example], *, heldout_share: float, rng: np.random.Generator) -> Split:
    """Cap every package at ``MAX_SHARE`` and hold out the same share of each."""
    by_label = _by_label(examples)
    cap = _cap([len(found) for found in by_label.values()])
    train: list[Example] = []
    heldout: list[Example] = []
    for found in by_label.values():
        kept = [found[i] for i in rng.permutation(len(found))[:cap]]
        border = max(1, round(len(kept) * heldout_share))
        heldout += kept[:border]
        train += kept[border:]
    return Split(tuple(_shuffled(train, rng)), tuple(_shuffled(heldout, rng)))


def deal(
    examples: Iterable[Example], *, devices: int, home_share: float, rng: np.random.Generator
) -> list[list[Example]]:
    """Deal examples to devices unevenly: each package has a home device that holds ``home_share`` of it.

    The rest of a package goes to all devices in turn. Homes are given to the largest packages first, each time to the
    device with least, so that every device has enough to train on. Every example goes to exactly one device.
    """
    by_label = _by_label(examples)
    hands: list[list[Example]] = [[] for _ in range(devices)]
    for found in sorted(by_label.values(), key=lambda found: (-len(found), found[0].label)):
        home = min(range(devices), key=lambda device: (len(hands[device]), device))
        order = [found[i] for i in rng.permutation(len(found))]
        border = round(len(order) * home_share)
        hands[home] += order[:border]
        for i, example in enumerate(order[border:]):
            hands[(home + i) % devices].append(example)
    return [_shuffled(hand, rng) for hand in hands]


def _packages(stdlib: Path) -> dict[str, list[Path]]:
    """The Python files of every top-level package or module, by public name."""
    found: dict[str, list[Path]] = {}
    for path in sorted(stdlib.iterdir()):
        name = PUBLIC_NAMES.get(path.stem, path.stem)
        if path.stem in EXCLUDED | FOREIGN or name.startswith("_"):
            continue
        files = [path] if path.suffix == ".py" else sorted(path.rglob("*.py")) if path.is_dir() else []
        files = [file for file in files if INNER_EXCLUDED.isdisjoint(file.relative_to(stdlib).parts)]
        if files:
            found.setdefault(name, []).extend(files)
    return found


def _texts(files: Iterable[Path], task: str) -> Iterator[str]:
    for file in files:
        source = file.read_text(encoding="utf-8", errors="replace")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes in other people's source
                module = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # templates and the like: not Python, so no docstrings
        yield from docstrings(module) if task == "classify" else functions_of(source)(module)


def _by_label(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """Examples by package; packages and their examples sorted, so that the order of arrival does not matter."""
    found: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda example: (example.label, example.text)):
        found.setdefault(example.label, []).append(example)
    return found


def _cap(sizes: list[int]) -> int:
    """The largest cap that leaves no size above ``MAX_SHARE`` of the sum; as equal as possible where none does."""
    cap = max(sizes)
    while cap > min(sizes) and cap > MAX_SHARE * sum(min(size, cap) for size in sizes):
        cap -= 1
    return cap


def _shuffled(examples: list[Example], rng: np.random.Generator) -> list[Example]:
    return [examples[i] for i in rng.permutation(len(examples))]
