"""What is kept of an update so that it can be compared with others later: its norm, and a sketch of its direction.

A count sketch (Charikar, Chen, Farach-Colton 2002): every value of the update is added to, or taken from, one of WIDTH
sums; which one, and which of the two, is drawn once a round. The scalar product of two sketches is then that of the two
updates in expectation, with a standard error of at most sqrt(2 / WIDTH) times both norms, 1/sqrt(WIDTH) where the
updates are nearly orthogonal. It follows from one update alone, whatever came before it.

The draw follows from the round's private key, so that it is the same after a kill, and no device can know it and make
an update that its sketch does not show.

A tier carries a part of every stronger one (:mod:`cloud.aggregate.tiers`). So that devices of all tiers can be compared
in what they have in common, an update is sketched once for every tier whose part it carries: its own and the weaker
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from edge_runtime.wire import Layout, Update, norm_of

Values = npt.NDArray[np.float32]

WIDTH = 4096  # 16 kB an update and tier, and cosines to within 0.016
_CONTEXT = b"emberlora sketch 1\0"
_CHUNK = 1 << 16  # values added at once


@dataclass(frozen=True)
class Part:
    """One tier's part of an update: its L2 norm, and the sketch of its direction, shape (WIDTH,), float32.

    The sketch is that of the part divided by its norm; zeros where the norm is 0.
    """

    norm: float
    sketch: Values


@dataclass(frozen=True)
class Imprint:
    """An update's own tier, and its part of that tier and each weaker one, in this order."""

    tier: int
    parts: tuple[Part, ...]


class Sketcher:
    """Makes imprints of the updates of one round; threads may share it."""

    def __init__(self, layouts: Sequence[Layout], secret: bytes) -> None:
        """``layouts`` are those of the plan's tiers; all draws follow from ``secret``, of at least 32 bytes."""
        self._layouts = tuple(layouts)
        seed = HKDF(SHA256(), length=32, salt=None, info=_CONTEXT).derive(secret)
        self._seed = int.from_bytes(seed, "little")
        self._places: dict[int, npt.NDArray[np.uint16]] = {}

    def imprint(self, update: Update) -> Imprint:
        """What is kept of an update that was checked against the plan and its tier's layout."""
        own = update.metrics.tier
        parts = (self._part(update, tier) for tier in range(own, len(self._layouts)))
        return Imprint(own, tuple(parts))

    def _part(self, update: Update, tier: int) -> Part:
        values = self._carried(update, tier)
        norm = norm_of(values)
        places, sums = self._places_of(tier), np.zeros(2 * WIDTH)
        for start in range(0, len(values) if norm else 0, _CHUNK):
            part = values[start : start + _CHUNK] / np.float64(norm)
            sums += np.bincount(places[start : start + _CHUNK], weights=part, minlength=2 * WIDTH)
        return Part(norm, (sums[:WIDTH] - sums[WIDTH:]).astype(np.float32))

    def _carried(self, update: Update, tier: int) -> Values:
        """The values of an update that a tier carries, too, in that tier's order."""
        if tier == update.metrics.tier:
            return update.values
        mine, least = self._layouts[update.metrics.tier].split(update.values), self._layouts[tier]
        values: Values = np.empty(least.count, np.float32)
        for name, out in least.split(values).items():
            out[...] = mine[name][tuple(map(slice, out.shape))]
        return values

    def _places_of(self, tier: int) -> npt.NDArray[np.uint16]:
        """To which sum each value of a tier's layout goes, shape (count,): the first WIDTH are added to."""
        if tier not in self._places:  # two threads that make it at once make the same
            rng = np.random.default_rng([self._seed, tier])
            self._places[tier] = rng.integers(0, 2 * WIDTH, self._layouts[tier].count, np.uint16)
        return self._places[tier]
