"""What must hold, and what the simulation writes down in order to check it. It shares no code with what it checks.

After every operation:

1.  *Acknowledged is kept.* An update that the server acknowledged is in its database, with that digest and weight, and
    stays there, whatever is killed.
2.  *Once.* A round has at most one update of a device.
3.  *Nobody else.* An update in the database was sent by its device for its round; none is forged, and none is there
    of which every delivery was refused.
4.  *Weights.* It counts with the weight of its training, cut to the cap.
5.  *Rounds rise by one*, from 0, and only the last one is open; what is final stays as it is.
6.  *Forward only.* The round of the plans that the server gives never falls; neither does that of a device, and it
    never trains for a round before one that it has seen.
7.  *Keys.* Only an open round has its private key.

After healing, when faults have ended, disks have room and everything runs:

8.  *It ends.* The task finishes, and every enrolled device gets the last adapter.
9.  *Exact.* What every device trained from, and what is published, is the first adapter plus the weighted means of the
    one-hot contributions in the database: who was counted, with which weight, and how often.
10. *Discarded by name.* Only a task that was stopped discards a round, and only its last one.
11. *Audit.* The chain of the log is whole and says what the database says.
12. *Nothing is left.* No sealed update of a final round lies in the server's folder, nor a part of one, and no private
    round key in any file of it; no update, sealed or not, lies in a device's home.
13. *No surprise.* Server and devices raised nothing but the errors that they name.
14. *The operator is told so*, by ``cloud status``, also after one more restart.
15. *Outliers by the rule.* Where the task has one, an applied round has set aside who is beyond it by cosines and norms
    that are computed here, as many as may go, the largest first; elsewhere nobody. After a restart it is the same.

A contribution is one-hot, and twice that at one more place, which all share: so honest ones are alike (cosine 0.8),
one that is turned around opposes the others, and one that is 64 times as large is the largest of any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
WEIGHTS = (1, 2, 3, 8)  # of device 0, 1, …
WEIGHT_CAP = 6
FIRST_MODULE = "layer.0.q"  # of the tiny bundle, whose two factors have room for more devices
SHARED = len(WEIGHTS)  # the place where all contribute
NORM_FACTOR, MIN_COSINE, JUDGED_FROM = 5.0, -0.15, 4  # the rule of tasks that have one
Refused = Literal["nan", "weight", "plan", "short", "sealed"]  # ways to be wrong that the server sees at once
Outlying = Literal["large", "turned"]  # and such that are well-formed
Forged = Refused | Outlying
_TIMES = {"large": 64.0, "turned": -1.0}


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


class Round(NamedTuple):
    """A round, as the database says."""

    round: int
    state: str
    key: bytes | None


class Training(NamedTuple):
    """What a device contributes: ``value`` at the index of its number, twice that at ``SHARED``, 0 elsewhere."""

    device: int
    round: int
    value: float
    forged: bool  # and must be refused

    def write(self, line: npt.NDArray[np.floating]) -> None:
        """Write it over zeros, shape (n,)."""
        line[self.device], line[SHARED] = self.value, 2 * self.value


@dataclass
class Delivery:
    """An update that reached the server; ``outcome`` is what it decided, if it lived to."""

    device: str
    round: int
    digest: str
    outcome: str = ""  # "acknowledged", or the name of the refusal


class Seen(NamedTuple):
    """An adapter that a device was about to train from."""

    device: int
    round: int
    tensors: Mapping[str, Array]


@dataclass
class Ledger:
    """What happened, as seen from outside."""

    initial: Mapping[str, Array]
    names: Mapping[str, int]  # number of every device
    least: int | None = None  # devices that a round keeps of its outliers; None: there is no rule for these
    made: int = 0  # trainings
    trainings: dict[tuple[int, int], Training] = field(default_factory=dict)  # newest by device and round
    sent: dict[str, Training] = field(default_factory=dict)  # by digest
    deliveries: list[Delivery] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    rows: frozenset[Row] = frozenset()
    rounds: tuple[Round, ...] = ()
    keys: dict[int, bytes] = field(default_factory=dict)
    server_round: int = -1
    device_rounds: dict[int, int] = field(default_factory=dict)
    stopped: bool = False  # the operator asked for the end
    surprises: list[str] = field(default_factory=list)
    aside: frozenset[tuple[int, str]] | None = None  # round and device of the updates that were set aside

    def trained(self, device: int, round_: int, how: Forged | None = None) -> Training:
        """A training begins to write its contribution; no two have the same value. Exact in float32."""
        value = (1.0 + (self.made % 1024) / 1024) / 32  # a large one is within the plan's bound, too
        training = Training(device, round_, value * _TIMES.get(how or "", 1.0), how in get_args(Refused))
        self.made += 1
        self.trainings[device, round_] = training
        return training

    def sends(self, device: int, round_: int, digest: str) -> None:
        """A device sends an update; the first time, it is that of its newest training for the round."""
        if digest not in self.sent:
            self.sent[digest] = self.trainings[device, round_]

    def planned(self, round_: int) -> None:
        """The server gave a plan."""
        demand(round_ >= self.server_round, f"6: the server gave plan {round_} after {self.server_round}")
        self.server_round = round_

    def obeys(self, device: int, round_: int, what: str) -> None:
        """A device has seen a round or works for it."""
        before = self.device_rounds.get(device, -1)
        demand(round_ >= before, f"6: device {device} {what} round {round_} after {before}")
        self.device_rounds[device] = round_

    def check(self, rows: Iterable[Row], rounds: Iterable[Round]) -> None:
        """Check what the database says now, and remember it."""
        rows, rounds = frozenset(rows), tuple(rounds)
        demand(self.rows <= rows, f"1: gone from the database: {sorted(self.rows - rows)}")
        acknowledged = [one for one in self.deliveries if one.outcome == "acknowledged"]
        known = {(row.round, row.device, row.digest) for row in rows}
        lost = [one for one in acknowledged if (one.round, one.device, one.digest) not in known]
        demand(not lost, f"1: acknowledged and not in the database: {lost}")
        demand(len({row[:2] for row in rows}) == len(rows), f"2: counted twice: {sorted(rows)}")
        for row in rows - self.rows:
            self._check_row(row)
        self._check_rounds(rounds)
        self.rows, self.rounds = rows, rounds

    def _check_row(self, row: Row) -> None:
        training = self.sent.get(row.digest)
        demand(training is not None, f"3: nobody sent {row}")
        assert training is not None, "demanded above"
        demand(not training.forged, f"3: forged, and counted: {row}")
        own = (self.names[row.device], row.round) == (training.device, training.round)
        demand(own, f"3: {row} counts what was made by device {training.device} for round {training.round}")
        mine = [one for one in self.deliveries if (one.round, one.device, one.digest) == row[:3]]
        good = any(one.outcome in ("", "acknowledged") for one in mine)
        demand(good, f"3: {row} counts, and every delivery of it was refused: {[one.outcome for one in mine]}")
        weight = min(WEIGHTS[training.device], WEIGHT_CAP)
        demand(row.weight == weight, f"4: {row}: expected weight {weight}")

    def _check_rounds(self, rounds: tuple[Round, ...]) -> None:
        numbers = [one.round for one in rounds]
        demand(numbers == list(range(len(rounds))), f"5: rounds {numbers}")
        states = [one.state for one in rounds]
        final = all(state in ("applied", "discarded") for state in states[:-1])
        demand(final and states[-1:] != ["applied"], f"5: states of the rounds: {states}")
        kept = [one.state for one in self.rounds if one.state != "open"]
        demand(states[: len(kept)] == kept, f"5: states changed from {kept} to {states}")
        for one in rounds:
            demand((one.key is not None) == (one.state == "open"), f"7: round {one.round} is {one.state}, key kept")
            if one.key is not None:
                self.keys[one.round] = one.key

    def told(self, aside: Iterable[tuple[int, str]]) -> None:
        """The server says whom it has set aside, once the task has ended."""
        found = frozenset(aside)
        demand(self.aside in (None, found), f"15: set aside: {sorted(found)}, before: {sorted(self.aside or ())}")
        self.aside = found

    def check_end(self, published: Mapping[str, Array]) -> None:
        """Check the sums and the names, once the task has ended."""
        states = [one.state for one in self.rounds]
        demand(states[-1] == "finished", f"8: states of the rounds: {states}")
        discarded = [number for number, state in enumerate(states) if state == "discarded"]
        allowed = ([], [len(states) - 2]) if self.stopped else ([],)
        demand(discarded in allowed, f"10: discarded: {discarded} of {states}, stopped: {self.stopped}")
        for one in self.rounds[:-1]:
            self._check_aside(one)
        expected = self.adapters()
        for one in self.seen:
            _compare(one.tensors, expected[one.round], f"9: device {one.device} trained round {one.round} from")
        _compare(published, expected[-1], "9: published:")
        demand(not self.surprises, f"13: {self.surprises}")

    def adapters(self) -> list[dict[str, Array]]:
        """What every round starts from, and the last adapter; from the database's rows alone."""
        adapter = dict(self.initial)
        found = [adapter]
        for one in self.rounds[:-1]:
            rows = [row for row in self._applied(one) if (row.round, row.device) not in (self.aside or ())]
            name = f"{FIRST_MODULE}.lora_{'ab'[one.round % 2 == 0]}"  # factors alternate, B first
            hot = np.zeros((len(rows), adapter[name].size))
            for line, row in zip(hot, rows, strict=True):
                self.sent[row.digest].write(line)
            if rows:
                mean = np.average(hot, axis=0, weights=[row.weight for row in rows])
                moved = (adapter[name].astype(np.float64).ravel() + mean).astype(np.float32)
                adapter = {**adapter, name: moved.reshape(adapter[name].shape)}
            found.append(adapter)
        return found

    def _applied(self, one: Round) -> list[Row]:
        """The counted updates of a round, those among them that were set aside; none of a round that was discarded."""
        return sorted(row for row in self.rows if row.round == one.round and one.state == "applied")

    def _check_aside(self, one: Round) -> None:
        rows = self._applied(one)
        gone = {device for round_, device in self.aside or () if round_ == one.round}
        hot = np.zeros((len(rows), SHARED + 1))
        for line, row in zip(hot, rows, strict=True):
            self.sent[row.digest].write(line)
        large, opposed = _beyond(hot) if self.least is not None and len(rows) >= JUDGED_FROM else ([], [])
        room = max(len(rows) - max(self.least or 0, len(rows) // 2 + 1), 0)
        names = [row.device for row in rows]
        first, others = {names[at] for at in large}, {names[at] for at in opposed}
        text = f"15: round {one.round} has set {sorted(gone)} aside; large: {sorted(first)}, opposed: {sorted(others)}"
        demand(gone <= first | others and len(gone) == min(room, len(first) + len(others)), text)
        demand(len(gone & first) == min(room, len(first)), text)

    def check_folder(self, folder: Path) -> None:
        """Check that nothing is left in the server's folder that must not be."""
        left = sorted(path.name for path in (folder / "blobs" / "updates").iterdir())
        demand(not left, f"12: updates left: {left}")
        left = sorted(str(path.relative_to(folder)) for path in (folder / "parts").rglob("*") if path.is_file())
        demand(not left, f"12: parts of updates left: {left}")
        files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "keys" not in path.parts}
        for round_, key in self.keys.items():
            where = [str(path.relative_to(folder)) for path, data in files.items() if key in data]
            demand(not where, f"12: the private key of round {round_} is left in {where}")


def _beyond(hot: npt.NDArray[np.float64]) -> tuple[list[int], list[int]]:
    """Which contributions, shape (devices, n), are too large for the rule, and which of the others oppose these."""
    norms = [float(np.linalg.norm(line)) for line in hot]
    large = [at for at, norm in enumerate(norms) if norm > NORM_FACTOR * np.median(norms)]
    units = {at: hot[at] / norms[at] for at in range(len(hot)) if at not in large}
    opposed = []
    for at, unit in units.items():
        rest = np.sum([other for place, other in units.items() if place != at], axis=0)
        if unit @ rest < MIN_COSINE * np.linalg.norm(rest):
            opposed.append(at)
    return large, opposed


def check_home(home: Path) -> None:
    """Check that nothing is left in a device's home that must not be."""
    left = [str(path.relative_to(home)) for name in ("outbox", "work") for path in (home / name).rglob("*")]
    demand(not left, f"12: left in {home.name}: {left}")


def _compare(found: Mapping[str, Array], expected: Mapping[str, Array], what: str) -> None:
    for name, array in expected.items():
        if not np.array_equal(found[name], array):
            at = np.argwhere(found[name] != array)[0]
            raise BrokenError(f"{what} {name}{at.tolist()}: {found[name][tuple(at)]}, expected {array[tuple(at)]}")
