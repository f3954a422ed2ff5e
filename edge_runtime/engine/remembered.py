"""What the frozen lower blocks make of each example, remembered on disk from the first epoch on.

Below the lowest alive block nothing changes while an adapter is trained, so what enters that block is the same every
time an example is seen. It is kept in half precision in one file that has no name, so that the system takes it back
however the process ends.

A memory serves one dataset, one adapter and one alive set. Nothing in it could tell that it is asked about others, so
it must not meet them: the training loop makes it part of a course, the engine takes it with ``use`` and closes it at
the next one, and only training steps read it. A closed memory holds nothing and takes nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

from edge_runtime.bundle import Array
from edge_runtime.engine.errors import EngineInputError

_DEFAULT_BYTES = 2 << 30  # 10,000 examples of 128 tokens at width 768; more would wear flash for little
_FREE_SHARE = 10  # a tenth of what is free: nobody misses it for the time of a round
_LARGEST = 2.0**127  # rounding up from there would leave float32; infinity and NaN are not below it either
_TOP_EXPONENT = 15  # a token's largest value is scaled below 2**15; half precision ends at 65,504

Examples = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


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
    """Hidden states of examples by their index in one dataset.

    A token takes 2 bytes a value and 4 for its scale. Its values come back with a relative error of at most 2**-11;
    those below 2**-28 of its largest value with an error of at most 2**-39 of that value. So the massive activations
    of decoders do not overflow.

    Attributes:
        used_bytes: Bytes in the file, at most the limit; after closing, as they were.
        trouble: Why remembering ended early, None if it did not.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """Nothing is written before there is something to remember.

        Args:
            folder: On the disk that is to be used.
            max_bytes: Examples that do not fit into it any more are computed every time; 0 remembers nothing.
        """
        self.used_bytes = 0
        self.trouble: str | None = None
        self._folder = folder
        self._max_bytes = max_bytes
        self._file: IO[bytes] | None = None
        self._closed = False
        self._places: dict[int, tuple[int, int, int]] = {}  # example -> offset in bytes, tokens, width

    @property
    def examples(self) -> int:
        """How many examples are remembered."""
        return len(self._places)

    def __enter__(self) -> RememberedHidden:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk back; from now on everything is computed. Closing again changes nothing."""
        self._closed = True
        self._places.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def forget(self) -> None:
        """Begin anew, with the same limit: what is remembered is of other blocks than those asked about from now on."""
        self._places.clear()
        self.used_bytes = 0

    def recall(self, examples: Examples, wanted: Flags, compute: Callable[[Flags], Array]) -> Array:
        """Hidden states of a batch: read where they are remembered, computed and remembered where not.

        A batch of which a part is remembered is divided: past the limit nearly every batch has such a part, and would
        otherwise be computed as a whole.

        Args:
            examples: Indices in the dataset, shape (b,).
            wanted: Which tokens matter, shape (b, s); for an example always equally many.
            compute: Given which examples are missing, shape (b,), their hidden states, shape (missing, s, width).

        Returns:
            Shape (b, s, width), float32; what was read is zero where it is not wanted.

        Raises:
            EngineInputError: an example is remembered with another number of tokens, so it is of another dataset.
        """
        missing = np.array([int(example) not in self._places for example in examples])
        found: dict[int, Array] = {}
        for row in np.flatnonzero(~missing).tolist():
            rows = self._read(int(examples[row]), int(wanted[row].sum()))
            if rows is None:
                return compute(np.ones_like(missing))
            found[row] = rows
        computed = compute(missing) if missing.any() else None
        if computed is not None:
            for example, flags, hidden in zip(examples[missing], wanted[missing], computed, strict=True):
                self._keep(int(example), hidden[flags])
            if missing.all():
                return computed
        width = next(iter(found.values())).shape[-1]
        out = np.zeros((*wanted.shape, width), dtype=np.float32)
        if computed is not None:
            out[missing] = computed
        for row, rows in found.items():
            out[row, wanted[row]] = rows
        return out

    def _keep(self, example: int, rows: Array) -> None:
        """Remember the wanted tokens of an example, shape (tokens, width); a full disk ends all remembering."""
        size = len(rows) * (2 * rows.shape[1] + 4)
        if self._closed or example in self._places or self.used_bytes + size > self._max_bytes:
            return
        if not np.abs(rows).max(initial=0) < _LARGEST:  # nor is NaN
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  # open until close()
            if os.pwrite(self._file.fileno(), _pack(rows), self.used_bytes) != size:
                raise OSError("the disk took only a part")
        except OSError as error:
            self._give_up(error)
            return
        self._places[example] = (self.used_bytes, *rows.shape)
        self.used_bytes += size

    def _read(self, example: int, tokens: int) -> Array | None:
        """The wanted tokens of an example, shape (tokens, width); None when the disk does not give them back."""
        place = self._places.get(example)
        if place is None or self._file is None:
            return None
        offset, kept, width = place
        if kept != tokens:
            raise EngineInputError(f"remembered: example {example}: expected {tokens} tokens, got {kept}")
        size = tokens * (2 * width + 4)
        try:
            data = os.pread(self._file.fileno(), size, offset)
            if len(data) != size:
                raise OSError("the disk gave back only a part")
        except OSError as error:
            self._give_up(error)
            return None
        return _unpack(data, tokens)

    def _give_up(self, error: OSError) -> None:
        # A full disk hurts others more than computing hurts us: everything is given back.
        self.trouble = f"remembering ended, blocks are computed again: {error.strerror or error}"
        self.close()


def _pack(rows: Array) -> bytes:
    """Scales of all tokens, then the scaled values in half precision."""
    exponents = np.frexp(np.abs(rows).max(axis=1))[1] - _TOP_EXPONENT
    # Powers of two, so that scaling is exact; not below the smallest normal number, whose inverse is finite.
    scales = np.ldexp(np.float32(1), np.maximum(exponents, -126)).astype(np.float32)
    return b"".join((scales.tobytes(), (rows / scales[:, None]).astype(np.float16).tobytes()))


def _unpack(data: bytes, tokens: int) -> Array:
    """What :func:`_pack` was given, shape (tokens, width), float32."""
    scales = np.frombuffer(data, np.float32, tokens)
    values = np.frombuffer(data, np.float16, offset=scales.nbytes).reshape(tokens, -1)
    return np.asarray(values.astype(np.float32) * scales[:, None])
