"""Running a list of operations, healing the world afterwards, and finding the shortest list that still fails."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from safetensors.numpy import load_file

from cloud.config import parse_config
from cloud.init import init_folder
from cloud.outliers import Outliers
from cloud.store import Database, Identity
from edge_runtime.device import capability
from edge_runtime.wire import Capability, WireError
from tests.cloud.cloud_fleet import make_bundle
from tests.simulation import ops as o
from tests.simulation.device import Actor
from tests.simulation.ledger import (
    JUDGED_FROM,
    MIN_COSINE,
    NORM_FACTOR,
    WEIGHT_CAP,
    WEIGHTS,
    Ledger,
    check_home,
    demand,
)
from tests.simulation.link import Network
from tests.simulation.loop import SimulatedLoop, disk
from tests.simulation.server import START, Server, ServerDownError, Task

DEVICES = len(WEIGHTS)  # at most
NEEDED = 2  # devices a round, where nobody is judged
_RULE = Outliers(enabled=True, norm_factor=NORM_FACTOR, min_cosine=MIN_COSINE, min_devices=JUDGED_FROM)
_HEAL_S, _HEAL_STEPS = 2.0, 300
# Where a round needs all devices, nobody can stand in for one that was refused: it waits for its deadline, which a
# wrong clock may have set an hour too late.
_HEAL_ALL_S = 15.0
_TICKS_S = 1.1  # in which the server tries again what failed
_CONFIG = f"""
[task]
name = "tiny"
bundle = "../bundle"
rounds = 2
devices_per_round = {NEEDED}
min_devices = 1
round_deadline_s = 20
weight_cap = {WEIGHT_CAP}
"""
_MACHINE = Capability(machine="simulated", cores=1, memory_mb=2048, available_mb=1024)


def room() -> Path | None:
    """Where scenarios keep their files: in memory, where the system has such a place."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None


def make_task(folder: Path) -> Task:
    """What all scenarios share, in ``folder``.

    A server finds what one leaves that was killed when it had made its database; that saves time.
    """
    bundle = make_bundle(folder / "bundle", task="lm")
    path = init_folder(folder / "site", bundle=bundle.folder, task="tiny", force=False)
    config = parse_config(_CONFIG.encode(), path=path)
    database = Database(config.data_path / "emberlora.sqlite3")
    identity = Identity(config.task.name, bundle.digest)
    database.open(identity)
    database.begin_log(identity, START)
    asyncio.run(database.close())
    return Task(config, bundle, config.data_path)


def _ruled(task: Task, seed: int) -> Task:
    """The task with two rounds or, seldom, three, which a device may have to close with others or may alone.

    One task in four has a rule for outliers, and rounds for as many devices as that needs.
    """
    rules = msgspec.structs.replace(task.config.task, rounds=3 if seed % 4 == 3 else 2, min_devices=1 + seed % 2)
    config = msgspec.structs.replace(task.config, task=rules)
    if seed % 4 == 1:
        rules = msgspec.structs.replace(rules, devices_per_round=JUDGED_FROM, min_devices=1 + seed % 8 // 4)
        config = msgspec.structs.replace(config, task=rules, outliers=_RULE)
    return replace(task, config=config)


class World:
    """A server, devices and the network between them."""

    def __init__(self, task: Task, folder: Path, loop: SimulatedLoop, rng: random.Random) -> None:
        names = {f"device-{number}": number for number in range(DEVICES)}
        stored = load_file(task.bundle.path("adapter.safetensors"))
        initial = {name: array for name, array in stored.items() if not name.startswith("__pad")}
        rules = task.config.task
        self.ledger = Ledger(initial, names, rules.min_devices if task.config.outliers.enabled else None)
        self._needed = rules.devices_per_round
        self.server = Server(task, folder, loop, rng, self.ledger)
        self.network = Network(self.server, self.ledger)
        self.starts = 0  # of the server, until the task had ended
        self.devices = [Actor(number, folder, self.network, loop=loop, rng=rng) for number in range(DEVICES)]

    def place(self, device: int | None) -> Server | Actor:
        """A device, or else the server."""
        return self.server if device is None else self.devices[device]

    async def run(self, ops: Sequence[o.Op]) -> None:
        """Carry out the operations, then heal, and check all the time."""
        await self.server.start()
        for op in ops:
            await _PERFORM[type(op)](self, op)
            await asyncio.sleep(op.then)
            self.check()
        await self.heal()
        await self.check_end()

    def check(self) -> None:
        """The invariants that hold at any time."""
        self.server.check()
        for device in self.devices:
            device.check()
        demand(not self.ledger.surprises, f"13: {self.ledger.surprises}")

    async def heal(self) -> None:
        """End all faults, and wait until the task is finished everywhere."""
        for place in (self.server, *self.devices):
            place.skew_s = 0.0
            if place.process is not None:
                place.process.disarm()
        self.server.fill(False)
        for device in self.devices:
            device.fill(False)
            device.weather.faults.clear()
            device.training.open_up()
            device.uploading.open_up()
        pause_s = _HEAL_S if self._needed < DEVICES else _HEAL_ALL_S
        for step in range(_HEAL_STEPS):
            await self._help(more=step // 20)
            if await self._finished():
                break
            await asyncio.sleep(pause_s)
            self.check()
        await asyncio.sleep(_TICKS_S)
        demand(await self._finished(), f"8: not finished after {pause_s * _HEAL_STEPS:.0f} s: {self._where()}")

    async def _help(self, *, more: int) -> None:
        """What people do: start what is down, have those who left and do not know it leave, find enough devices.

        ``more`` of these than a round needs: one that was refused in the open round cannot help to close it. Where
        that does not help, those that were refused leave, and come back to send another update.
        """
        await self.server.start()
        for device in self.devices:
            if device.name in self.network.left or (more > DEVICES and self._refused(device)):
                await device.leave()
        for device in self.devices:
            if sum(one.enrolled for one in self.devices) < self._needed + more:
                await device.join()
            if not device.home.state().finished:
                await device.start()

    def _refused(self, device: Actor) -> bool:
        """Whether it is done with the open round, and does not count in it."""
        round_ = device.home.state().done_round
        is_open = any(one.round == round_ and one.state == "open" for one in self.ledger.rounds)
        return (
            device.enrolled
            and is_open
            and not any((row.round, row.device) == (round_, device.name) for row in self.ledger.rows)
        )

    async def _finished(self) -> bool:
        devices = [device for device in self.devices if device.enrolled]
        late = any(not task.done() for task in self.network.late)
        up = self.server.up and self.server.aggregator is not None and self.server.aggregator.finished
        return up and not late and all(device.home.state().finished and not device.up for device in devices)

    def _where(self) -> str:
        lines = [f"server up {self.server.up}, rounds {[one.state for one in self.ledger.rounds]}"]
        return "; ".join(lines + [f"{d.name} up {d.up} {d.home.state()}" for d in self.devices if d.enrolled])

    async def check_end(self) -> None:
        """The invariants of a task that has ended."""
        self.starts = len(self.server.processes)
        self.check()
        self.ledger.check_folder(self.server.folder)
        await self._check_status()
        self.ledger.check_end(self.server.published())
        for device in self.devices:
            if device.enrolled:
                check_home(device.home.folder)
        self.server.check_audit()
        await self.server.close()
        self.ledger.check_folder(self.server.folder)
        await self.server.start()
        await self._check_status()
        self.check()

    async def _check_status(self) -> None:
        """What the operator is told."""
        status = await self.server.call(lambda aggregator: aggregator.status())
        told = (status.state, status.round, status.received, [one.round for one in status.history])
        applied = [one.round for one in self.ledger.rounds if one.state == "applied"]
        demand(told == ("finished", len(self.ledger.rounds) - 1, 0, applied), f"14: the operator is told {told}")
        names = {device.name for device in status.devices if not device.left}
        known = {device.name for device in self.devices if device.enrolled}
        demand(known <= names, f"14: of {known} the operator is told {names}")
        self.ledger.told((one.round, out.device) for one in status.history for out in one.outliers if not out.kept)


async def _replay(world: World, op: o.Replay) -> None:
    sent = world.network.sent
    if len(sent) < op.back:
        return
    again = sent[-op.back]
    if op.claims is not None:
        device = world.devices[op.claims]
        again = replace(again, device=device.name, key=device.key)
    with contextlib.suppress(ServerDownError, WireError):
        await world.server.call(world.network.deliver(again))


async def _stop_task(world: World, _op: o.StopTask) -> None:
    world.ledger.stopped = True
    with contextlib.suppress(ServerDownError, WireError):
        await world.server.call(lambda aggregator: aggregator.stop())


async def _rotate_plan_key(world: World, _op: o.RotatePlanKey) -> None:
    with contextlib.suppress(ServerDownError, WireError):
        await world.server.call(lambda aggregator: aggregator.rotate_plan_key())


async def _kill(world: World, op: o.KillServer | o.KillDevice) -> None:
    process = world.place(op.device if isinstance(op, o.KillDevice) else None).process
    if process is not None:
        process.arm(op.at, op.nth, process.kill)


async def _fill(world: World, op: o.FillDisk) -> None:
    place = world.place(op.device)
    if place.process is None or op.at == "now":
        place.fill(True)
    else:
        place.process.arm(op.at, op.nth, lambda: place.fill(True))


async def _set_clock(world: World, op: o.SetClock) -> None:
    world.place(op.device).skew_s = op.seconds


async def _make_room(world: World, op: o.MakeRoom) -> None:
    world.place(op.device).fill(False)


async def _set_weather(world: World, op: o.Op) -> None:
    if isinstance(op, o.Corrupt | o.DropRequest | o.DropResponse | o.Delay | o.HangUp):
        world.devices[op.device].weather.faults.append(op)
    elif isinstance(op, o.OldPlan):
        world.devices[op.device].weather.old_plan = True


async def _act(world: World, op: o.Op) -> None:
    """What a device or its user does."""
    if isinstance(op, o.Join):
        world.devices[op.device].in_parts = op.in_parts
        await world.devices[op.device].join()
    elif isinstance(op, o.Leave):
        await world.devices[op.device].leave()
    elif isinstance(op, o.StartDevice):
        await world.devices[op.device].start()
    elif isinstance(op, o.Train):
        world.devices[op.device].training.let()
    elif isinstance(op, o.Upload):
        world.devices[op.device].uploading.let()
    elif isinstance(op, o.Work):
        world.devices[op.device].training.let()
        world.devices[op.device].uploading.let()
    elif isinstance(op, o.Forge):
        world.devices[op.device].forge = op.how


_PERFORM: dict[type[o.Op], Callable[[World, Any], Awaitable[None]]] = {
    **dict.fromkeys((o.Join, o.Leave, o.StartDevice, o.Train, o.Upload, o.Work, o.Forge), _act),
    **dict.fromkeys((o.Corrupt, o.DropRequest, o.DropResponse, o.Delay, o.HangUp, o.OldPlan), _set_weather),
    o.FillDisk: _fill,
    o.MakeRoom: _make_room,
    o.SetClock: _set_clock,
    o.KillServer: _kill,
    o.KillDevice: _kill,
    o.StartServer: lambda world, _: world.server.start(),
    o.CloseServer: lambda world, _: world.server.close(),
    o.Replay: _replay,
    o.StopTask: _stop_task,
    o.RotatePlanKey: _rotate_plan_key,
    o.Advance: lambda _, op: asyncio.sleep(op.seconds),
}


def run(task: Task, ops: Sequence[o.Op], *, seed: int = 0) -> World:
    """Carry out a scenario.

    Args:
        task: From :func:`make_task`.
        ops: What happens.
        seed: Of all that is drawn: keys, jitter, how long threads take.

    Raises:
        BrokenError: an invariant does not hold.
    """
    rng = random.Random(seed)
    loop = SimulatedLoop(rng)
    machine = mock.patch.object(capability, "machine", return_value=_MACHINE)  # else it depends on what runs beside it
    folder = Path(tempfile.mkdtemp(dir=room(), prefix="emberlora-simulation-"))
    try:
        with disk(), machine:
            world = World(_ruled(task, seed), folder, loop, rng)
            try:
                loop.run_until_complete(world.run(ops))
                demand(not loop.errors, f"13: {loop.errors}")
                return world
            finally:
                loop.bury()
                world.server.bury()
    finally:
        shutil.rmtree(folder)


def failure(task: Task, ops: Sequence[o.Op], *, seed: int) -> str | None:
    """What is wrong with a scenario: the text of the error, whichever it is."""
    try:
        run(task, ops, seed=seed)
    except Exception as error:  # noqa: BLE001 - a scenario that ends otherwise than it should is what is looked for
        return f"{type(error).__name__}: {error}"
    return None


def shrink(task: Task, ops: Sequence[o.Op], *, seed: int, tries: int = 400) -> tuple[o.Op, ...]:
    """A short part of a failing list that still fails, by leaving out ever smaller parts (Zeller's ddmin)."""
    kept, size = tuple(ops), max(len(ops) // 2, 1)
    while size:
        start = 0
        while start < len(kept) and tries:
            shorter, tries = kept[:start] + kept[start + size :], tries - 1
            if failure(task, shorter, seed=seed) is not None:
                kept = shorter
            else:
                start += size
        size //= 2
    return kept


def case(ops: Sequence[o.Op], seed: int) -> str:
    """A list as Python text, to be pasted as a named case."""
    lines = "".join(f"    {op!r},\n" for op in ops)
    return f"OPS = (\n{lines})  # seed={seed}"
