"""Which of its examples a device trains on in a round, where a plan asks for a share of them.

After some rounds a model makes nothing of most examples any more: it knows them, and their gradients are next to
nothing. An example's *importance* is the norm of the gradient of its own loss by the last hidden state, which bounds
what it adds to any gradient but for a constant (Katharopoulos and Fleuret 2018, arXiv 1803.00942); a training step
makes it anyway, halfway through. A device keeps what each example's was when it was last trained on, and draws a share
of them without replacement, each as likely as its importance says. Gradients are not weighted in return: what is hard
counts for more, as in Selective-Backprop (Jiang et al. 2019, arXiv 1910.00762).

An example that was never trained on is as important as the most important one, so that new ones come first; what has
next to no importance has a tenth of the mean, for an example that was learned may be forgotten.

Nothing of this leaves the device. It is kept, encrypted, once the round is acknowledged, as all that is carried over.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from edge_runtime.at_rest import Vault
from edge_runtime.bundle import TensorFileError, encode_tensors
from edge_runtime.data import Dataset, Example
from edge_runtime.engine.interface import Ids
from edge_runtime.engine.parameters import Flat
from edge_runtime.training.carried import read_arrays

_LEAST = 0.1  # of the mean importance: then an example that teaches nothing is seen every few rounds
_ROUNDING = 1e-9  # a tenth of thirty is three
_KEY_BYTES = 16
_KEYS, _VALUES = "keys", "importance"


@dataclass(frozen=True)
class Sample:
    """The examples of one round.

    Attributes:
        every: All the device has.
        chosen: Numbers of those that are trained on, rising; None: all of them, and nothing is to be kept.
        importance: Of every example, shape (n,), float32; NaN where it is not known.
        notice: A line for the user about what was lost; empty if nothing was.
    """

    every: Dataset
    chosen: Ids | None = None
    importance: Flat = field(default_factory=lambda: np.zeros(0, np.float32))
    notice: str = ""

    @cached_property
    def dataset(self) -> Dataset:
        """What is trained on."""
        return self.every if self.chosen is None else self.every.take(self.chosen.tolist())

    def encoded(self, found: Flat) -> bytes:
        """The file for the next round.

        Args:
            found: What training has found, shape (chosen,); NaN where it did not see it.
        """
        assert self.chosen is not None, "nothing is kept where nothing is chosen"
        known = self.importance.copy()
        known[self.chosen] = np.where(np.isnan(found), known[self.chosen], found)
        there = ~np.isnan(known)
        return encode_tensors({_KEYS: _keys(self.every)[there], _VALUES: known[there]})


def draw_sample(dataset: Dataset, share: float, file: Path | None, vault: Vault, rng: np.random.Generator) -> Sample:
    """Choose the examples of a round.

    Args:
        dataset: All the device has.
        share: Of its examples, more than 0 and less than 1; at least one is chosen.
        file: Where earlier rounds left what they found; None, or no such file: nothing is known.
        vault: The device's, for importance.
        rng: Of the draw.

    Raises:
        WrongStorageKeyError: the file was encrypted under another storage key.
    """
    importance, notice = _known(dataset, file, vault)
    return Sample(dataset, draw(importance, share, rng), importance, notice)


def draw(importance: Flat, share: float, rng: np.random.Generator) -> Ids:
    """Numbers of ⌈share · n⌉ examples, rising, drawn without replacement in proportion to importance.

    Args:
        importance: Shape (n,), 0 or more, NaN where it is not known; n ≥ 1.
        share: More than 0, at most 1.
        rng: Of the draw.
    """
    count = max(1, math.ceil(share * len(importance) - _ROUNDING))
    likely = np.nan_to_num(importance.astype(np.float64), nan=_largest(importance))
    likely += _LEAST * likely.mean()
    total = likely.sum()
    chances = likely / total if total > 0 else None  # where everything is learned all are alike
    return np.sort(rng.choice(len(likely), size=count, replace=False, p=chances)).astype(np.int64)


def _largest(importance: Flat) -> float:
    known = importance[~np.isnan(importance)]
    return float(known.max()) if known.size and known.max() > 0 else 1.0


def _known(dataset: Dataset, file: Path | None, vault: Vault) -> tuple[Flat, str]:
    """What is known of each example, and what to tell the user."""
    unknown = np.full(len(dataset), np.nan, np.float32)
    try:
        stored = read_arrays(vault, "importance", file) if file else {}
        if not stored:
            return unknown, ""
        keys, values = stored.get(_KEYS), stored.get(_VALUES)
        if keys is None or values is None or keys.dtype != np.uint8 or keys.shape != (len(values), _KEY_BYTES):
            raise TensorFileError(f"expected {_KEYS} of {_KEY_BYTES} bytes and {_VALUES}")
        if values.dtype != np.float32 or not (np.isfinite(values) & (values >= 0)).all():
            raise TensorFileError(f"{_VALUES}: expected finite float32, 0 or more")
    except TensorFileError as error:  # which costs a round or two of finding it out again
        return unknown, f"what this device knew of its examples' importance is lost: {error}"
    known = {key.tobytes(): value for key, value in zip(keys, values, strict=True)}
    return np.array([known.get(key.tobytes(), np.nan) for key in _keys(dataset)], np.float32), ""


def _keys(dataset: Dataset) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """What tells an example from others, shape (n, 16): texts come and go, and their places in the files change."""
    digests = b"".join(_key(example) for example in dataset.examples)
    return np.frombuffer(digests, np.uint8).reshape(len(dataset), _KEY_BYTES)


def _key(example: Example) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(example.ids).tobytes(), digest_size=_KEY_BYTES)
    digest.update(np.asarray(example.targets).tobytes())
    return digest.digest()
