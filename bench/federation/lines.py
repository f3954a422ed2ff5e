"""Results: one run a line, appended to a file; a run that is there is not made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from bench.errors import RequestError


class Key(msgspec.Struct, frozen=True):
    """What tells one run from another. ``alpha`` None is the data's own split, ``without`` an ingredient left out."""

    dataset: str
    alpha: float | None
    seed: int
    method: str
    budget: str
    without: str
    quick: bool


class RoundLine(msgspec.Struct, frozen=True):
    """One round.

    Attributes:
        accuracy: Of the adapter it made, on a part of the test texts; None where it was not measured.
        bytes_up: Of its devices together, bodies of requests.
        bytes_down: The same of answers, plans included.
        params_up: Values in their updates.
        params_down: Values they fetched.
        gflop: What their training computed.
        drift: Mean over devices of ‖Δ_k − Δ̄‖ / ‖Δ̄‖.
        alive: Living factors of all factors, from 0 to 1.
        rank: Mean rank of the living modules.
        train_s: Seconds that the devices trained, added up.
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


class Line(msgspec.Struct, frozen=True):
    """One run.

    Attributes:
        dataset: clinc150 or banking77.
        alpha: Of the Dirichlet split; None: the data's own.
        seed: Of split, cohorts, task.
        method: A name of :mod:`bench.federation.methods`.
        budget: A size of the method where it has several, else "".
        without: An ingredient that was turned off, else "".
        accuracy: At the end, on all test texts, from 0 to 1.
        bytes_up: Of all devices and rounds, the head's upload left out.
        bytes_down: The same of plans and adapters; the first download left out.
        params_up: Values sent.
        params_down: Values fetched.
        bytes_head: Both ways, for the head of class means, before the first round.
        bytes_first_download: The bundle, once a device that took part.
        device_gflop: Operations of all training.
        rounds: Training rounds.
        rounds_to_95: Rounds until the run's own accuracy is 95 % of its best; None without a curve.
        accuracy_start: Before the first training round.
        drift: Mean over the rounds.
        devices: How many there are.
        seconds: Of the whole run on this machine.
        quick: Fewer rounds and texts.
        commit: The checkout's, with + when it was changed.
        curve: Round by round.
        host: Processor, cores, threads, versions.
    """

    dataset: str
    alpha: float | None
    seed: int
    method: str
    budget: str
    without: str
    accuracy: float
    bytes_up: int
    bytes_down: int
    params_up: int
    params_down: int
    bytes_head: int
    bytes_first_download: int
    device_gflop: float
    rounds: int
    rounds_to_95: int | None
    accuracy_start: float
    drift: float | None
    devices: int
    seconds: float
    quick: bool
    commit: str
    curve: tuple[RoundLine, ...]
    host: dict[str, Any]

    @property
    def key(self) -> Key:
        """What tells this run from another."""
        return Key(self.dataset, self.alpha, self.seed, self.method, self.budget, self.without, self.quick)


def append_line(path: Path, line: Line) -> None:
    """Append a line in one write, so that processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(msgspec.json.encode(line) + b"\n")


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
