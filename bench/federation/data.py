"""Real texts with labels, divided among devices: by a Dirichlet draw a class, or as the data itself is divided."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.errors import RequestError
from bench.federation.shares import Record, Shares, Sizes

Labelled = tuple[str, str]  # text, label
_FEWEST = 16  # examples of a device: one batch
_DRAWS = 1_000  # of a split, until every device has that many; Dirichlet 0.01 needs some


@dataclass(frozen=True)
class Corpus:
    """A classification task. ``domains`` maps labels to the domain they belong to; empty where there are none."""

    train: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    domains: dict[str, str]

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label, sorted."""
        return tuple(sorted({label for _, label in self.train}))


def read_corpus(name: str, data: Path) -> Corpus:
    """Read a data set from a folder as ``shared/data`` is.

    Raises:
        RequestError: it is not there, or something else.
    """
    try:
        return _clinc150(data / "text_clinc150") if name == "clinc150" else _banking77(data / "text_banking77")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{data}: not the data of {name}: {type(error).__name__} {error}") from error


def labels_of(name: str, data: Path) -> tuple[str, ...]:
    """Every label of a data set, sorted.

    Raises:
        RequestError: it is not there, or something else.
    """
    return read_corpus(name, data).labels


def share_texts(name: str, data: Path, sizes: Sizes, alpha: float | None, seed: int) -> Shares:
    """Divide a data set. What is held out is in an order that is the same in every run, and its first of all labels.

    Raises:
        RequestError: see :func:`read_corpus` and :func:`divide`.
    """
    corpus = read_corpus(name, data)
    parts = divide(corpus, devices=sizes.devices, examples=sizes.examples, alpha=alpha, seed=seed)
    parts = _unequal(parts, sizes.spread, seed)
    held_out = [corpus.test[index] for index in np.random.default_rng(0).permutation(len(corpus.test))]
    return Shares(tuple(map(_records, parts)), _records(held_out))


def _unequal(parts: tuple[tuple[Labelled, ...], ...], spread: float, seed: int) -> tuple[tuple[Labelled, ...], ...]:
    """What devices keep of their examples; never less than a batch."""
    if not spread:
        return parts
    drawn = np.random.default_rng([seed, 3]).lognormal(sigma=spread, size=len(parts))
    return tuple(
        part[: max(_FEWEST, round(len(part) * share))] for part, share in zip(parts, drawn / drawn.max(), strict=True)
    )


def _records(examples: Sequence[Labelled]) -> tuple[Record, ...]:
    return tuple({"text": text, "label": label} for text, label in examples)


def _clinc150(folder: Path) -> Corpus:
    splits = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    train, test = (tuple((text, label) for text, label in splits[name] if text.strip()) for name in ("train", "test"))
    return Corpus(train, test, {label: domain for domain, labels in domains.items() for label in labels})


def _banking77(folder: Path) -> Corpus:
    sides = []
    for name in ("train", "test"):
        with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            sides.append(tuple((row["text"], row["category"]) for row in csv.DictReader(file) if row["text"].strip()))
    return Corpus(sides[0], sides[1], {})


def divide(
    corpus: Corpus, *, devices: int, examples: int, alpha: float | None, seed: int
) -> tuple[tuple[Labelled, ...], ...]:
    """Give each device its examples.

    Args:
        corpus: Where they come from.
        devices: How many there are.
        examples: Of all devices together, drawn without replacement.
        alpha: Of the Dirichlet distribution over devices that is drawn for every label: the smaller, the fewer labels
            a device has (Hsu et al., arXiv 1909.06335). None: domains go round the devices, each to equally many.
        seed: Of the choice and the split, the same for all methods.

    Raises:
        RequestError: no split was found in which every device has 16 examples, or the corpus has no domains.
    """
    rng = np.random.default_rng([seed, 1])
    chosen = [corpus.train[index] for index in rng.permutation(len(corpus.train))[:examples]]
    if alpha is None:
        owners = _by_domain([corpus.domains.get(label, "") for _, label in chosen], devices)
    else:
        owners = _by_dirichlet([label for _, label in chosen], devices, alpha, rng)
    return tuple(
        tuple(example for example, owner in zip(chosen, owners, strict=True) if owner == device)
        for device in range(devices)
    )


def _by_domain(domains: Sequence[str], devices: int) -> npt.NDArray[np.int64]:
    names = sorted(set(domains))
    if names == [""] or devices % len(names):
        raise RequestError(f"natural split: expected as many devices as domains or a multiple, got {devices}")
    share = devices // len(names)
    seen = dict.fromkeys(names, 0)
    owners = []
    for domain in domains:
        owners.append(names.index(domain) * share + seen[domain] % share)
        seen[domain] += 1
    return np.array(owners)


def _by_dirichlet(labels: Sequence[str], devices: int, alpha: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    places = {label: np.flatnonzero([label == other for other in labels]) for label in sorted(set(labels))}
    best = 0
    for _ in range(_DRAWS):
        owners = np.empty(len(labels), np.int64)
        for mine in places.values():
            shares = rng.dirichlet(np.full(devices, alpha))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(mine)).astype(np.int64)
            for device, part in enumerate(np.split(rng.permutation(mine), cuts)):
                owners[part] = device
        fewest = int(np.bincount(owners, minlength=devices).min())
        best = max(best, fewest)
        if fewest >= _FEWEST:
            return owners
    raise RequestError(
        f"Dirichlet {alpha} over {devices} devices: expected {_FEWEST} examples a device, got {best} at best "
        f"in {_DRAWS} draws"
    )
