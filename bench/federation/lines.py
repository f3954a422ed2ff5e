"""Results: one run a line, appended to a file; a run that is there is not made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from bench.errors import RequestError
from bench.federation.metric import ACCURACY, LOSS, Metric


class Key(msgspec.Struct, frozen=True):
    """What tells one run from another. ``alpha`` None is the data's own split, ``without`` an ingredient left out."""

    dataset: str
    alpha: float | None
    seed: int
    method: str
    budget: str
    without: str
    quick: bool


class RoundLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One round.

    Attributes:
        accuracy: Of the adapter it made, on a part of the test texts; None where it was not measured, or the loss was.
        bytes_up: Of its devices together, bodies of requests.
        bytes_down: The same of answers, plans included.
        params_up: Values in their updates.
        params_down: Values they fetched.
        gflop: What their training computed.
        drift: Mean over devices of ‖Δ_k − Δ̄‖ / ‖Δ̄‖.
        alive: Living factors of all factors, from 0 to 1.
        rank: Mean rank of the living modules.
        train_s: Seconds that the devices trained, added up.
        loss: Of a language model in place of the accuracy, on a part of the held-out texts.
    """

    accuracy: float | None
    bytes_up: int
    bytes_down: int
    params_up: int
    params_down: int
    gflop: float
    drift: float | None
    alive: float
    rank: float
    train_s: float
    loss: float | None = None

    @property
    def bytes_both(self) -> int:
        """Up and down."""
        return self.bytes_up + self.bytes_down

    @property
    def value(self) -> float | None:
        """Of whatever the run is judged by."""
        return self.accuracy if self.loss is None else self.loss


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run, judged by its accuracy or by its loss.

    Attributes:
        dataset: A key of :data:`bench.federation.workloads.WORKLOADS`.
        alpha: Of the Dirichlet split; None: the data's own.
        seed: Of split, cohorts, task.
        method: A name of :mod:`bench.federation.methods`.
        budget: A size of the method where it has several, else "".
        without: An ingredient that was turned off, else "".
        accuracy: At the end, on all test texts, from 0 to 1; None for a language model.
        bytes_up: Of all devices and rounds, the head's upload left out.
        bytes_down: The same of plans and adapters; the first download left out.
        params_up: Values sent.
        params_down: Values fetched.
        bytes_head: Both ways, for the head of class means, before the first round.
        bytes_first_download: The bundle, once a device that took part.
        device_gflop: Operations of all training.
        rounds: Training rounds.
        rounds_to_95: Rounds until the run's own accuracy is 95 % of its best, or its loss has fallen by 95 % of what it
            falls at best; None where it never is.
        accuracy_start: Before the first training round, on the part of the test texts that is measured on the way.
        drift: Mean over the rounds.
        devices: How many there are.
        seconds: Of the whole run on this machine.
        quick: Fewer rounds and texts.
        commit: The checkout's, with + when it was changed.
        curve: Round by round.
        host: Processor, cores, threads, versions.
        settings: Config keys of a variant, by table, in place of the method's.
        loss: Of a language model, at the end, mean over the tokens of all held-out texts in nats; else None.
        loss_start: The same as ``accuracy_start``.
    """

    dataset: str
    alpha: float | None
    seed: int
    method: str
    budget: str
    without: str
    accuracy: float | None
    bytes_up: int
    bytes_down: int
    params_up: int
    params_down: int
    bytes_head: int
    bytes_first_download: int
    device_gflop: float
    rounds: int
    rounds_to_95: int | None
    accuracy_start: float | None
    drift: float | None
    devices: int
    seconds: float
    quick: bool
    commit: str
    curve: tuple[RoundLine, ...]
    host: dict[str, Any]
    loss: float | None = None
    loss_start: float | None = None
    settings: dict[str, dict[str, Any]] = {}

    def __post_init__(self) -> None:
        """Raises ValueError, which reading makes an error of the line."""
        pairs = (self.accuracy, self.accuracy_start), (self.loss, self.loss_start)
        if sorted(pair.count(None) for pair in pairs) != [0, 2]:
            raise ValueError("expected accuracy and accuracy_start, or loss and loss_start")

    @property
    def bytes_both(self) -> int:
        """Up and down, of all devices and rounds."""
        return self.bytes_up + self.bytes_down

    @property
    def params_both(self) -> int:
        """Values up and down."""
        return self.params_up + self.params_down

    @property
    def metric(self) -> Metric:
        """What the run is judged by."""
        return ACCURACY if self.loss is None else LOSS

    @property
    def start(self) -> float:
        """Its value before the first training round, on what is measured on the way."""
        return _given(self.accuracy_start if self.loss is None else self.loss_start)

    @property
    def end(self) -> float:
        """Its value at the end, on all that is held out."""
        return _given(self.accuracy if self.loss is None else self.loss)

    @property
    def values(self) -> tuple[float | None, ...]:
        """Its values round by round."""
        return tuple(made.value for made in self.curve)

    @property
    def nearly(self) -> float:
        """95 % of what was learned at best on the way."""
        return self.metric.nearly(self.start, self.values)

    @property
    def key(self) -> Key:
        """What tells this run from another."""
        return Key(self.dataset, self.alpha, self.seed, self.method, self.budget, self.without, self.quick)


def _given(value: float | None) -> float:
    assert value is not None, "the line was checked when it was made"
    return value


def read_lines(path: Path) -> dict[Key, Line]:
    """All runs by key, a later one in the place of an earlier one; none when there is no file.

    Raises:
        RequestError: a line is not a run.
    """
    found: dict[Key, Line] = {}
    if not path.exists():
        return found
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = msgspec.json.decode(text, type=Line)
        except msgspec.DecodeError as error:
            raise RequestError(f"{path}: line {number}: not a result: {error}") from error
        found[line.key] = line
    return found
