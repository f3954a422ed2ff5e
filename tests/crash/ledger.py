"""What must hold, whoever is killed and when. It shares no code with what it checks: SQLite's own reader, safetensors,
and ``np.average`` over what the trainings wrote down.

Whenever the server is dead, and at the end:

1.  *Acknowledged is kept.* An update that a device was told counts is in the database, with that digest and weight, and
    what was there once stays.
2.  *Once.* A round has at most one update of a device, and it is one that this device sealed and sent for this round.
3.  *Same round.* A server that is started again is in the round in which the last one was killed, with what it had; one
    whose round was full may be in the next.
4.  *Soon.* It answers within five seconds, those not counted in which the machine had no processor for it.

At the end:

5.  *Nothing is lost.* Every round is applied, and has one update of every device: rounds wait for all of them.
6.  *Exact.* Every adapter that a device trained from is the bundle's plus the weighted means of the rounds before, as
    computed here, bit for bit; so is what the server and every device publish at the end.
7.  *Devices agree.* A device knows each of its updates as counted, once.
8.  *Nothing is left.* No sealed update, nor part of one, lies at the server, nothing unsent in a home, and no process
    of the scenario runs.
9.  *It ends well.* Server and devices end with 0.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from tests.crash.child import WEIGHTS
from tests.crash.record import notes

Array = npt.NDArray[np.float32]
ROUNDS = 2
WEIGHT_CAP = 6  # of the weights 2 and 8 it cuts one
RESTART_S = 5.0
_FIRST_MODULE = "layer.0.q"  # the first block of every layout: its factors alternate, B first


class BrokenError(Exception):
    """An invariant does not hold."""


def demand(holds: object, text: str) -> None:
    if not holds:
        raise BrokenError(text)


class Row(NamedTuple):
    """A counted update, as the database says."""

    round: int
    device: str
    digest: str
    weight: int


class Stored(NamedTuple):
    """What the database holds: its rounds' states, and its updates."""

    states: tuple[str, ...]
    rows: frozenset[Row]

    @property
    def round(self) -> int:
        """The last one."""
        return len(self.states) - 1

    @property
    def received(self) -> int:
        """Updates of the last round."""
        return sum(row.round == self.round for row in self.rows)


def read_store(data: Path) -> Stored:
    """What a data folder without a server holds; read in a copy, as reading changes files beside the database."""
    with tempfile.TemporaryDirectory() as folder:
        for file in data.glob("emberlora.sqlite3*"):
            if not file.name.endswith("-shm"):  # shared memory of the dead
                shutil.copy(file, folder)
        connection = sqlite3.connect(Path(folder) / "emberlora.sqlite3")
        try:
            states = [state for (state,) in connection.execute("SELECT state FROM rounds ORDER BY round")]
            rows = [Row(*row) for row in connection.execute("SELECT round, device, digest, weight FROM updates")]
        finally:
            connection.close()
    demand(len({row[:2] for row in rows}) == len(rows), f"2: counted twice: {sorted(rows)}")
    return Stored(tuple(states), frozenset(rows))


class Ledger:
    """What was seen of one scenario so far."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.stored = Stored((), frozenset())

    def check_store(self) -> None:
        """Check what the data folder holds; its server is dead."""
        told = notes(self._folder, "acknowledged")  # what is told now was committed before the server died
        stored = read_store(self._folder / "site" / "data")
        demand(self.stored.rows <= stored.rows, f"1: gone: {sorted(self.stored.rows - stored.rows)}")
        acknowledged = {Row(one["round"], one["device"], one["digest"], one["weight"]) for one in told}
        demand(acknowledged <= stored.rows, f"1: acknowledged and lost: {sorted(acknowledged - stored.rows)}")
        sent = {(one["round"], one["device"], one["digest"]) for one in notes(self._folder, "sent")}
        foreign = {row[:3] for row in stored.rows} - sent
        demand(not foreign, f"2: counted, and nobody sent it: {sorted(foreign)}")
        demand(stored.round >= self.stored.round, f"3: {stored.round} after round {self.stored.round}")
        self.stored = stored

    def check_restart(self, started: Mapping[str, object], seconds: float) -> None:
        """Check what a server says that was started on the folder."""
        now, before = (started["round"], started["received"]), (self.stored.round, self.stored.received)
        full = self.stored.received == len(WEIGHTS)
        same = now[0] == before[0] and now[1] >= before[1]  # type: ignore[operator]
        demand(same or (full and now[0] == before[0] + 1), f"3: round and updates were {before}, are {now}")
        demand(seconds < RESTART_S, f"4: the server answers after {seconds:.1f} s")

    def check_end(self) -> None:
        """Check a scenario whose task has ended; its server, too."""
        self.check_store()
        states, rows = self.stored
        demand(states == ("applied",) * ROUNDS + ("finished",), f"5: states of the rounds: {states}")
        counted = sorted((row.round, row.device) for row in rows)
        demand(counted == [(number, name) for number in range(ROUNDS) for name in WEIGHTS], f"5: counted: {counted}")
        weights = {row.device: row.weight for row in rows}
        demand(weights == {name: min(weight, WEIGHT_CAP) for name, weight in WEIGHTS.items()}, f"5: {weights}")
        self._check_adapters()
        for name in WEIGHTS:
            self._check_home(name)
        data = self._folder / "site" / "data"
        left = [path.name for place in (data / "blobs" / "updates", data / "parts") for path in place.rglob("*")]
        demand(not left, f"8: left of updates: {left}")

    def adapters(self) -> list[dict[str, Array]]:
        """What every round starts from, and the last adapter, from the database's digests and what was trained."""
        frames = {one["digest"]: one["frame"] for one in notes(self._folder, "sealed")}
        trained = {one["frame"]: one for one in notes(self._folder, "trained")}
        adapter = _tensors(self._folder / "bundle" / "adapter.safetensors")
        found = [adapter]
        for number in range(ROUNDS):
            rows = sorted(row for row in self.stored.rows if row.round == number)
            name = f"{_FIRST_MODULE}.lora_{'ba'[number % 2]}"
            hot = np.zeros((len(rows), adapter[name].size))
            for line, row in zip(hot, rows, strict=True):
                training = trained[frames[row.digest]]
                own = (training["round"], training["device"]) == (row.round, row.device)
                demand(own, f"2: {row} counts what was trained as {training}")
                line[list(WEIGHTS).index(row.device)] = training["value"]
            mean = np.average(hot, axis=0, weights=[row.weight for row in rows])
            moved = (adapter[name].astype(np.float64).ravel() + mean).astype(np.float32)
            adapter = {**adapter, name: moved.reshape(adapter[name].shape)}
            found.append(adapter)
        return found

    def _check_adapters(self) -> None:
        expected = self.adapters()
        for one in notes(self._folder, "seen"):
            where = f"{one['device']} trained round {one['round']} from"
            _compare(_tensors(self._folder / one["file"]), expected[one["round"]], where)
        last = {_peft_name(name): array for name, array in expected[-1].items()}
        for published in (
            self._folder / "site" / "data" / "published",
            *(self._folder / n / "published" for n in WEIGHTS),
        ):
            tensors = load_file(published / "adapter_model.safetensors")
            _compare(tensors, last, str(published.relative_to(self._folder)))

    def _check_home(self, name: str) -> None:
        state = json.loads((self._folder / name / "state.json").read_text())
        told = (state["done_round"], state["counted"], state["finished"])
        demand(told == (ROUNDS - 1, ROUNDS, True), f"7: {name}: done, counted and finished: {told}")
        log = (self._folder / f"{name}.log").read_text().splitlines()
        uploaded = [line["round"] for line in map(json.loads, log) if line["event"] == "uploaded"]
        demand(len(set(uploaded)) == len(uploaded), f"7: {name}: told as uploaded: {uploaded}")
        left = [
            str(p.relative_to(self._folder))
            for part in ("outbox", "work")
            for p in (self._folder / name / part).rglob("*")
        ]
        demand(not left, f"8: left: {left}")


def _tensors(path: Path) -> dict[str, Array]:
    return {name: array for name, array in load_file(path).items() if not name.startswith("__pad")}


def _peft_name(name: str) -> str:
    stem, factor = name.rsplit(".", 1)
    return f"base_model.model.{stem}.{factor.replace('_a', '_A').replace('_b', '_B')}.weight"


def _compare(found: Mapping[str, Array], expected: Mapping[str, Array], what: str) -> None:
    names: Iterable[str] = found.keys() | expected.keys()
    wrong = [name for name in names if name not in found or not np.array_equal(found[name], expected.get(name))]
    demand(not wrong, f"6: {what}: {[(n, found.get(n), expected.get(n)) for n in sorted(wrong)[:1]]}")
