"""What the frozen lower blocks make of each example, remembered on disk.

Below the lowest alive block nothing changes while an adapter is trained, so what enters that block is the same every
time an example is seen: in every epoch, and in later rounds for as long as nothing below is trained. When the lowest
alive block has risen, what was remembered further down spares the blocks below that.

Examples are known by a digest of their tokens, and a memory by what its hidden states follow from, its ground. So what
belongs to other data, another adapter or another model is never found. All of it is encrypted. The training loop makes
a memory part of a course, the engine says on which ground it stands, and only training steps read it. A closed memory
holds nothing open, finds nothing and takes nothing.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from edge_runtime.at_rest import Entropy
from edge_runtime.bundle import Array
from edge_runtime.engine.hidden_file import HEADER_BYTES, SECRET_BYTES, Ground, HiddenFile, Secret, record_bytes

_DEFAULT_BYTES = 2 << 30  # 10,000 examples of 128 tokens at width 768; more would wear flash for little
_FREE_SHARE = 10  # a tenth of what is free: nobody misses it
_LARGEST = 2.0**127  # rounding up from there would leave float32; infinity and NaN are not below it either

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Start:
    """Hidden states of some examples, shape (b, s, width), that have passed the lowest ``level`` blocks."""

    level: int
    hidden: Array


Compute = Callable[[Flags, Start | None], Array]


def memory_limit(folder: Path, remember_mb: int | None) -> int:
    """Bytes that may be remembered in ``folder``.

    Args:
        folder: On the disk in question.
        remember_mb: As the user asked, in MiB; None: 2 GiB, or a tenth of the free disk if that is less.
    """
    if remember_mb is not None:
        return remember_mb << 20
    return min(_DEFAULT_BYTES, shutil.disk_usage(folder).free // _FREE_SHARE)


class RememberedHidden:
    """Hidden states of examples at one level of a model.

    A token takes 2 bytes a value and 4 for its scale. Its values come back with a relative error of at most 2**-11;
    those below 2**-28 of its largest value with an error of at most 2**-39 of that value. So the massive activations
    of decoders do not overflow.

    Attributes:
        used_bytes: Bytes in the file, at most the limit; after closing, as they were.
        spared: Tokens that were not computed from the start, by how many blocks they were spared.
        trouble: Why remembering ended early, None if it did not.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        path: Path | None = None,
        secret: bytes | None = None,
        entropy: Entropy = os.urandom,
    ) -> None:
        """Nothing is written before there is something to remember.

        Args:
            folder: On the disk that is to be used.
            max_bytes: Examples that do not fit into it any more are computed every time; 0 remembers nothing.
            path: A file that outlives this memory, for the next one; None: one without a name, gone when it is closed.
            secret: 32 bytes that files are encrypted under; None: new ones, so that nobody after it reads them.
            entropy: For that, and for nonces.
        """
        self._secret = Secret(secret or entropy(SECRET_BYTES), entropy)
        self.used_bytes = 0
        self.spared: Counter[int] = Counter()
        self.trouble: str | None = None
        self._folder = folder
        self._max_bytes = max_bytes
        self._path = path
        self._ground = Ground(0, bytes(32))
        self._file: HiddenFile | None = None
        self._below: HiddenFile | None = None  # of a lower level, from before the lowest alive block rose
        self._asked: set[bytes] = set()
        self._full = False
        self._risen = False
        self._closed = False

    @property
    def lasting(self) -> bool:
        """Whether the next training may find what this one writes."""
        return self._path is not None

    @property
    def examples(self) -> int:
        """How many examples are remembered."""
        return 0 if self._file is None else len(self._file)

    def __enter__(self) -> RememberedHidden:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def stand_on(self, level: int, digest: Callable[[int], bytes]) -> None:
        """Say what the hidden states to come follow from, and take up what an earlier memory left.

        Args:
            level: How many blocks make them; at least 1.
            digest: Of so many blocks, from the first one up, with all that they compute with.
        """
        self._ground = Ground(level, digest(level))
        if self._path is None or self._closed:
            return
        try:
            if self._max_bytes == 0:
                self._path.unlink(missing_ok=True)
                return
            found = HiddenFile.open(self._path, self._secret)
        except OSError as error:
            self._give_up(error)
            return
        if found is None:
            return
        if found.ground == self._ground and found.bytes <= self._max_bytes:
            self._file, self.used_bytes = found, found.bytes
        elif found.ground.level < level and found.ground.digest == digest(found.ground.level):
            self._below = found
        else:
            found.close()

    def close(self) -> None:
        """Let go of the files; from now on everything is computed. Closing again changes nothing.

        A lasting file that is full of what nobody asked for is removed: the data have changed.
        """
        if self._file is not None and self._full and 2 * len(self._asked) < len(self._file):
            self._remove()
        self._closed = True
        for file in (self._file, self._below):
            if file is not None:
                file.close()
        self._file = self._below = None

    def rise(self, level: int, digest: Callable[[int], bytes]) -> None:
        """Go on at a higher level, for this training alone: blocks that it has changed so far are frozen now.

        What was remembered at the level before still spares the blocks below that, and is what lasts.
        """
        if self._below is not None:
            self._below.close()
        self._below, self._file = self._file, None
        self._ground = Ground(level, digest(level))
        self._risen, self._full, self.used_bytes = True, False, 0

    def recall(self, keys: Sequence[bytes], wanted: Flags, compute: Compute) -> Array:
        """Hidden states of a batch: read where they are remembered, computed and remembered where not.

        A batch of which a part is remembered is divided: past the limit nearly every batch has such a part, and would
        otherwise be computed as a whole.

        Args:
            keys: Of the examples, 16 bytes each, b of them; two with one key have equal tokens, all of which count.
            wanted: Which tokens matter, shape (b, s).
            compute: Given which examples are missing, shape (b,), and where to start from, None for the very start,
                their hidden states, shape (missing, s, width).

        Returns:
            Shape (b, s, width), float32; what was read is zero where it is not wanted.
        """
        self._asked.update(keys)
        found = self._read_all(self._file, keys, wanted)
        missing = np.array([row not in found for row in range(len(keys))])
        self._spare(self._ground.level, wanted[~missing])
        computed = compute(missing, self._start(keys, wanted, missing)) if missing.any() else None
        if computed is not None:
            for row, hidden in zip(np.flatnonzero(missing).tolist(), computed, strict=True):
                self._keep(keys[row], hidden[wanted[row]])
            if missing.all():
                return computed
        width = next(iter(found.values())).shape[-1]
        out = np.zeros((*wanted.shape, width), dtype=np.float32)
        if computed is not None:
            out[missing] = computed
        for row, rows in found.items():
            out[row, wanted[row]] = rows
        return out

    def _start(self, keys: Sequence[bytes], wanted: Flags, missing: Flags) -> Start | None:
        """Where the missing examples can start from; None unless all of them are remembered further down."""
        if self._below is None:
            return None
        flags = wanted[missing]
        rows = self._read_all(self._below, [key for key, gone in zip(keys, missing, strict=True) if gone], flags)
        if self._below is None or len(rows) < len(flags):
            return None
        hidden = np.zeros((*flags.shape, rows[0].shape[-1]), dtype=np.float32)
        for row, values in rows.items():
            hidden[row, flags[row]] = values
        self._spare(self._below.ground.level, flags)
        return Start(self._below.ground.level, hidden)

    def _spare(self, level: int, flags: Flags) -> None:
        if flags.any():
            self.spared[level] += int(flags.sum())

    def _read_all(self, file: HiddenFile | None, keys: Sequence[bytes], wanted: Flags) -> dict[int, Array]:
        """The rows of those examples that a file has; none when the disk does not give them back."""
        found: dict[int, Array] = {}
        if file is None:
            return found
        try:
            for row, key in enumerate(keys):
                rows = file.read(key) if key in file else None
                if rows is not None and len(rows) == wanted[row].sum():
                    found[row] = rows
        except OSError as error:
            self._give_up(error)
            return {}
        return found

    def _keep(self, key: bytes, rows: Array) -> None:
        """Remember the wanted tokens of an example, shape (tokens, width); a full disk ends all remembering."""
        if self._closed or (self._file is not None and key in self._file):
            return
        size = record_bytes(*rows.shape) + (HEADER_BYTES if self._file is None else 0)
        if self.used_bytes + size > self._max_bytes:
            self._full = True
            return
        if not np.abs(rows).max(initial=0) < _LARGEST:  # nor is NaN
            return
        try:
            if self._file is None:
                path = None if self._risen else self._path
                self._file = HiddenFile.create(self._ground, self._secret, folder=self._folder, path=path)
            self._file.append(key, rows)
        except OSError as error:
            self._give_up(error)
            return
        self.used_bytes += size

    def _give_up(self, error: OSError) -> None:
        # A full disk hurts others more than computing hurts us: everything is given back.
        self.trouble = f"remembering ended, blocks are computed again: {error.strerror or error}"
        self._remove()
        self.close()

    def _remove(self) -> None:
        if self._path is not None:
            try:
                self._path.unlink(missing_ok=True)
            except OSError:  # it is a cache, and what can be wrong with it is found out when it is read
                return
