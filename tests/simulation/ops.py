"""What can happen in a scenario, as data. A list of these and a seed are a whole scenario.

``then`` is how long the scenario waits after an operation, in seconds: 0 lets the next one come while this one is
still under way. Operations that have nothing to act on (a device that is not there, a server that is down) do nothing,
so that any list is a scenario and every part of one is, too: that is what shrinking needs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, get_args

from tests.simulation.ledger import Forged, Outlying, Refused

SETTLE_S = 0.05
Part = Literal["plan", "patch", "blob", "upload", "tell", "enrol", "leave"]  # of the traffic


@dataclass(frozen=True, kw_only=True)
class Op:
    """Base of all."""

    then: float = SETTLE_S

    def __repr__(self) -> str:
        given = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, repr=False)
class Join(Op):
    """The operator makes a token, if the device has none; the device enrols with it and starts.

    ``in_parts``: it sends its updates in parts from then on.
    """

    device: int
    in_parts: bool = False


@dataclass(frozen=True, repr=False)
class Leave(Op):
    """The device stops, tells the server that it leaves, and forgets who it was."""

    device: int


@dataclass(frozen=True, repr=False)
class Train(Op):
    """The training that the device has begun, or its next one, ends."""

    device: int


@dataclass(frozen=True, repr=False)
class Upload(Op):
    """The update that the device holds, or its next one, leaves; or tries to once more."""

    device: int


@dataclass(frozen=True, repr=False)
class Forge(Op):
    """The device's next training makes a bad update: NaN, weight 0, another plan's, too short, or not to be opened.

    Or one that is well-formed: 64 times as large as others, or turned around.
    """

    device: int
    how: Forged


@dataclass(frozen=True, repr=False)
class Replay(Op):
    """An upload that went over the network before goes once more; ``back`` 1 is the newest.

    ``claims``: as that device's, signed by it.
    """

    back: int = 1
    claims: int | None = None


@dataclass(frozen=True, repr=False)
class OldPlan(Op):
    """The device's next plan is the first one that the task had, as from an aggregator that was taken over."""

    device: int


@dataclass(frozen=True, repr=False)
class Corrupt(Op):
    """The device's next exchange of this part has a byte changed on its way."""

    device: int
    part: Part


@dataclass(frozen=True, repr=False)
class DropRequest(Op):
    """The device's next request of this part never arrives."""

    device: int
    part: Part


@dataclass(frozen=True, repr=False)
class DropResponse(Op):
    """The device's next request of this part is carried out, and its answer is lost."""

    device: int
    part: Part


@dataclass(frozen=True, repr=False)
class Delay(Op):
    """The device gives its next request of this part up; it arrives ``seconds`` later all the same."""

    device: int
    part: Part
    seconds: float = 2.0


@dataclass(frozen=True, repr=False)
class HangUp(Op):
    """The device's next request of this part is broken off ``seconds`` after it arrived; its handler is cancelled."""

    device: int
    part: Part
    seconds: float = 0.001


@dataclass(frozen=True, repr=False)
class KillServer(Op):
    """``kill -9`` at the ``nth`` instant whose name starts so; see :mod:`tests.simulation.loop`."""

    at: str = "now"
    nth: int = 1


@dataclass(frozen=True, repr=False)
class StartServer(Op):
    """The server starts on what is left of its folder."""


@dataclass(frozen=True, repr=False)
class CloseServer(Op):
    """The server ends in good order."""


@dataclass(frozen=True, repr=False)
class KillDevice(Op):
    """``kill -9`` at the ``nth`` instant whose name starts so."""

    device: int
    at: str = "now"
    nth: int = 1


@dataclass(frozen=True, repr=False)
class StartDevice(Op):
    """The device starts on what is left of its home."""

    device: int


@dataclass(frozen=True, repr=False)
class FillDisk(Op):
    """The server's disk, or a device's, has no room from the ``nth`` such instant on."""

    device: int | None = None
    at: str = "now"
    nth: int = 1


@dataclass(frozen=True, repr=False)
class MakeRoom(Op):
    """There is room again."""

    device: int | None = None


@dataclass(frozen=True, repr=False)
class Advance(Op):
    """So many seconds pass."""

    seconds: float = 1.0
    then: float = 0.0


@dataclass(frozen=True, repr=False)
class SetClock(Op):
    """The server's clock, or a device's, is so many seconds off from now on; time passes all the same."""

    seconds: float
    device: int | None = None


@dataclass(frozen=True, repr=False)
class StopTask(Op):
    """The operator ends the task."""


@dataclass(frozen=True, repr=False)
class RotatePlanKey(Op):
    """The operator has a new plan key made."""


@dataclass(frozen=True, repr=False)
class Work(Op):
    """:class:`Train` and :class:`Upload` in one."""

    device: int


SERVER_INSTANTS = (
    "now",
    "now",
    "fsync",
    "replace",
    "unlink",
    "sql COMMIT",
    "sql INSERT INTO updates",
    "sql INSERT INTO audit",
    "sql PRAGMA wal_checkpoint",
    "after open_update",
    "before put",
    "after put",
    "before add_updates",
    "after add_updates",
    "after _add_all",
    "before end_round",
    "after end_round",
    "after files",
    "after keep_only",
    "after _publish",
    "after move_deadline",
    "after note",
    "after note_stop",
    "after enrol",
    "after leave",
    "before _sum_again",
)
DEVICE_INSTANTS = (
    "now",
    "now",
    "fsync",
    "replace",
    "unlink",
    "request upload",
    "response upload",
    "request patch",
    "response",
)
_PARTS: tuple[Part, ...] = ("plan", "patch", "blob", "upload", "upload", "upload", "tell", "enrol", "leave")
_REFUSED: tuple[Refused, ...] = get_args(Refused)
_OUTLYING: tuple[Outlying, ...] = get_args(Outlying)
Story = Callable[[random.Random, int], tuple[Op, ...]]


def random_ops(rng: random.Random, devices: int) -> tuple[Op, ...]:
    """Twelve to some thirty operations: a fleet joins, then one short story follows another and some lose a part."""
    count, joined = rng.randint(12, 26), rng.sample(range(devices), rng.randint(1, devices))
    ops: list[Op] = [Join(device, rng.random() < 0.5, then=_pause(rng)) for device in joined]
    stories, weights = zip(*_STORIES, strict=True)
    while len(ops) < count:
        device = rng.choice(joined) if rng.random() < 0.9 else rng.randrange(devices)
        story = rng.choices(stories, weights)[0](rng, device)
        ops += [op for op in story if rng.random() < 0.9]
    return tuple(ops)


def _pause(rng: random.Random) -> float:
    return rng.choice((0.0, 0.002, 0.01, SETTLE_S, SETTLE_S))


def _work(rng: random.Random, device: int) -> tuple[Op, ...]:
    return (Work(device, then=_pause(rng)),) if rng.random() < 0.7 else (Train(device), Upload(device))


def _fault(rng: random.Random, device: int) -> tuple[Op, ...]:
    part = rng.choice(_PARTS)
    faults: tuple[Op, ...] = (
        Corrupt(device, part),
        DropRequest(device, part),
        DropResponse(device, part),
        Delay(device, part, rng.choice((0.01, 1.0, 15.0))),
        HangUp(device, part, rng.choice((0.0, 0.001, 0.003, 0.008))),
    )
    return (rng.choice(faults), *_work(rng, device))


def _instant(rng: random.Random, names: tuple[str, ...]) -> tuple[str, int]:
    """When something happens: at a named instant, or at any of the next ones."""
    return ("", rng.randint(1, 60)) if rng.random() < 0.5 else (rng.choice(names), rng.choice((1, 1, 2, 3, 8)))


def _kill_server(rng: random.Random, device: int) -> tuple[Op, ...]:
    kill = KillServer(*_instant(rng, SERVER_INSTANTS), then=_pause(rng))
    return (kill, *_work(rng, device), StartServer(then=_pause(rng)))


def _kill_device(rng: random.Random, device: int) -> tuple[Op, ...]:
    kill = KillDevice(device, *_instant(rng, DEVICE_INSTANTS), then=_pause(rng))
    return (kill, *_work(rng, device), StartDevice(device, then=_pause(rng)))


def _fill(rng: random.Random, device: int) -> tuple[Op, ...]:
    whose, names = rng.choice(((None, SERVER_INSTANTS), (None, SERVER_INSTANTS), (device, DEVICE_INSTANTS)))
    fill = FillDisk(whose, *_instant(rng, names), then=_pause(rng))
    return (fill, *_work(rng, device), Advance(1.0), MakeRoom(whose), StartDevice(device), StartServer())


_STORIES: tuple[tuple[Story, float], ...] = (
    (_work, 12),
    (_fault, 8),
    (_kill_server, 9),
    (_kill_device, 9),
    (_fill, 2),
    (lambda rng, d: (Replay(rng.randint(1, 4), rng.choice((None, None, d)), then=_pause(rng)),), 4),
    (lambda rng, d: (Forge(d, rng.choice(_REFUSED)), *_work(rng, d)), 2),
    (lambda rng, d: (Forge(d, rng.choice(_OUTLYING)), *_work(rng, d)), 3),
    (lambda rng, d: (OldPlan(d),), 1.5),
    (lambda rng, d: (Join(d, then=_pause(rng)),), 2),
    (lambda rng, d: (Leave(d, then=_pause(rng)), Join(d, then=_pause(rng))), 2),
    (lambda rng, _: (StartServer(),), 2),
    (lambda rng, _: (CloseServer(then=_pause(rng)), StartServer()), 1),
    (lambda rng, d: (StartDevice(d),), 2),
    (lambda rng, _: (Advance(rng.choice((0.01, 0.3, 1.0, 1.0, 3.0, 8.0, 30.0))),), 8),
    (lambda rng, d: (SetClock(rng.choice((-3600.0, -5.0, 5.0, 3600.0)), rng.choice((None, d))),), 1.5),
    (lambda rng, _: (StopTask(then=_pause(rng)),), 0.3),
    (lambda rng, _: (RotatePlanKey(then=_pause(rng)),), 0.5),
)
