"""Where a training is within its round, kept on disk, so that a device that was stopped or killed goes on from there.

A checkpoint holds all that the next step follows from: the trained values, the optimizer's moments, what stillness has
seen, the losses so far. The order of the batches follows from plan and data, so their number says which is next, and
a training that was resumed ends with the same values to the bit as one that was not interrupted; remembered hidden
states alone are rounded, and which examples they are read for may differ.

It belongs to one *ground*: plan, tier and examples. One of another ground is left alone and written over: the device
has moved on to another plan, or its user has given it other data. It is encrypted, for it follows from the user's
texts, and removed when the device is done with the round.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.at_rest import AtRestError, Vault, WrongStorageKeyError
from edge_runtime.bundle import Array, TensorFileError, encode_tensors, parse_tensors
from edge_runtime.bundle.atomic import write_atomically
from edge_runtime.data import Dataset
from edge_runtime.engine.interface import Score
from edge_runtime.engine.parameters import Flat
from edge_runtime.training.stillness import Watched

_SHARE = 50  # a training spends no more than a fiftieth of its time on checkpoints
_RECORD = "record"
_VALUES, _FIRST, _SECOND, _BEFORE, _IMPORTANCE = "values", "first", "second", "before", "importance"


class StoppedError(Exception):
    """The training was asked to end after a step; its checkpoint is written."""


@dataclass(frozen=True)
class Position:
    """A training after some of its steps.

    Attributes:
        values: Of what is trained, shape (layout.count,), float32.
        first: Running mean of the gradients, the same shape.
        second: Running mean of their squares, the same shape.
        watched: What stillness has seen.
        losses: Of every step so far, mean nats.
        seconds: All of them took.
        importance: Of the examples so far, see :class:`edge_runtime.training.local.Trained`.
        spared: See :class:`edge_runtime.training.local.Trained`.
    """

    values: Flat
    first: Flat
    second: Flat
    watched: Watched
    losses: tuple[float, ...]
    seconds: float
    importance: Flat
    spared: Mapping[int, int] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.losses)


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What of a checkpoint is no array of its own."""

    ground: str  # hex
    losses: tuple[float, ...]
    seconds: float
    spared: dict[int, int]
    still: tuple[str, ...]
    skipped: int
    shares: tuple[float, ...]
    usual: float | None
    evaluation: tuple[float, int, int]  # of the plan's adapter before training: summed loss, correct, rows


class Checkpoints:
    """The one file that a training's checkpoints are written to, each over the last.

    Args:
        path: The file.
        vault: Encrypts it.
        round_: That it belongs to.
        every_s: Seconds of training between two of them; 0 writes one after every step.
        clock: Seconds that never go back.

    Attributes:
        evaluation: What evaluating the plan's adapter found, so that a resumed round need not do it again.
    """

    def __init__(
        self,
        path: Path,
        vault: Vault,
        round_: int,
        *,
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.evaluation = Score()
        self._stepped = self._stopping = False
        self._path, self._vault, self._round = path, vault, round_
        self._every_s, self._clock = every_s, clock
        self._ground = ""
        self._last_s, self._cost_s = clock(), 0.0

    def begin(self, ground: str, *, count: int, examples: int) -> tuple[Position | None, str]:
        """Look for a checkpoint, once, before anything is trained or evaluated.

        Args:
            ground: What the training follows from; see :func:`ground_of`.
            count: Values that are trained.
            examples: That are trained on.

        Returns:
            Where to go on, None for the beginning; and a line for the user if a checkpoint had to be given up.

        Raises:
            WrongStorageKeyError: it was encrypted under another storage key, so it is whole and must not be lost.
        """
        self._ground = ground
        try:
            record, arrays = self._read()
        except FileNotFoundError:
            return None, ""
        except (AtRestError, TensorFileError, msgspec.DecodeError) as error:
            if isinstance(error, WrongStorageKeyError):
                raise
            return None, f"the round begins anew, its checkpoint cannot be used: {error}"
        if record.ground != ground:
            return None, ""
        importance = arrays.pop(_IMPORTANCE, np.full(examples, np.nan, np.float32))  # none in one of before it was kept
        if trouble := _trouble(record, arrays, count) or _strange(importance, examples):
            return None, f"the round begins anew, its checkpoint cannot be used: {trouble}"
        self.evaluation = Score(*record.evaluation)
        watched = Watched(frozenset(record.still), record.skipped, arrays.get(_BEFORE), record.shares, record.usual)
        position = Position(
            arrays[_VALUES],
            arrays[_FIRST],
            arrays[_SECOND],
            watched,
            record.losses,
            record.seconds,
            importance,
            record.spared,
        )
        return position, ""

    def after_step(self, position: Callable[[], Position]) -> None:
        """Write a checkpoint if it is time for one.

        Args:
            position: Makes it, when it is wanted.

        Raises:
            StoppedError: this step was to be the last.
            OSError: it cannot be written.
        """
        self._stepped = True
        since = self._clock() - self._last_s
        if self._stopping or since >= max(self._every_s, _SHARE * self._cost_s):
            began = self._clock()
            self._write(position())
            self._last_s = self._clock()
            self._cost_s = self._last_s - began
        if self._stopping:
            raise StoppedError

    def stop(self) -> bool:
        """Ask for a checkpoint after the step under way, and for the end.

        Returns:
            Whether there will be one; False before the first step, when nothing would be lost by ending at once.
        """
        self._stopping = self._stepped
        return self._stepped

    def _write(self, position: Position) -> None:
        watched, score = position.watched, self.evaluation
        record = _Record(
            ground=self._ground,
            losses=position.losses,
            seconds=position.seconds,
            spared=dict(position.spared),
            still=tuple(sorted(watched.still)),
            skipped=watched.skipped,
            shares=watched.shares,
            usual=watched.usual,
            evaluation=(score.loss_sum, score.correct, score.rows),
        )
        arrays: dict[str, Array] = {
            _RECORD: np.frombuffer(msgspec.json.encode(record), np.uint8),
            _VALUES: position.values,
            _FIRST: position.first,
            _SECOND: position.second,
            _IMPORTANCE: position.importance,
        }
        if watched.before is not None:
            arrays[_BEFORE] = watched.before
        data = self._vault.encrypt(encode_tensors(arrays), "checkpoint", round_=self._round)
        write_atomically(self._path, [data])

    def _read(self) -> tuple[_Record, dict[str, Array]]:
        data = self._vault.read(self._path, "checkpoint", round_=self._round)
        arrays = parse_tensors(data, what=self._path.name)
        record = msgspec.json.decode(arrays.pop(_RECORD, np.zeros(0, np.uint8)).tobytes(), type=_Record)
        return record, arrays


def ground_of(plan_digest: str, tier: int, dataset: Dataset) -> str:
    """What a training follows from, as hex: two with the same ground take the same steps.

    Args:
        plan_digest: Of the signed plan, hex: it names bundle, adapter, what is alive, settings and seed.
        tier: That the device carries.
        dataset: Its examples, in order.
    """
    digest = hashlib.sha256(f"{plan_digest} {tier} {len(dataset)} {dataset.max_tokens}\n".encode())
    for example in dataset.examples:
        targets = np.asarray(example.targets)
        digest.update(np.array([example.ids.size, targets.size], np.int64).tobytes())
        digest.update(np.ascontiguousarray(example.ids).tobytes())
        digest.update(targets.tobytes())
    return digest.hexdigest()


def _trouble(record: _Record, arrays: Mapping[str, Array], count: int) -> str:
    """What is wrong with a checkpoint of the right ground; empty if nothing is."""
    for name in (_VALUES, _FIRST, _SECOND, *arrays):
        array = arrays.get(name)
        if array is None or array.dtype != np.float32 or array.shape != (count,) or not np.isfinite(array).all():
            return f"{name}: expected {count} finite float32 values"
    return "" if record.losses else "losses: expected at least one step"


def _strange(importance: Array, examples: int) -> str:
    fits = importance.dtype == np.float32 and importance.shape == (examples,)
    if fits and not (np.isinf(importance) | (importance < 0)).any():
        return ""
    return f"{_IMPORTANCE}: expected {examples} float32, 0 or more or not known"
