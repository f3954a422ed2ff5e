"""Virtual devices: each has a home, a key and data of its own, and all share one set of weights in one engine.

A device is the one of ``edge_runtime.device``; what it is given is a transport within the process, a trainer that runs
the round here instead of in a child, and a check of artifacts here instead of in a child.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from bench.federation.transport import MemoryTransport
from cloud.service import Aggregator
from edge_runtime import wire
from edge_runtime.at_rest import StorageKey
from edge_runtime.device.artifacts import Reply, Request, handle
from edge_runtime.device.events import DeviceEvent, Skipped, Waiting
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from edge_runtime.device.loop import Device, RunOptions, Tools
from edge_runtime.device.records import Identity, Settings
from edge_runtime.training.job import Done, Event, TrainingJob
from edge_runtime.training.round import run_round, write_frame
from edge_runtime.training.session import WorkingBundle

Values = npt.NDArray[np.float32]

KEY = StorageKey(bytes(32))  # nothing here is a secret


class FleetError(Exception):
    """A device did not do what it had to, so the run says nothing."""


@dataclass(frozen=True)
class Result:
    """What one device did in one round."""

    device: str
    done: Done
    up: int  # bytes of bodies
    down: int
    params_down: int  # values of factors in them
    head_down: int  # bytes of ``down`` that are a head


class SharedTrainer:
    """Runs rounds in this process, on one bundle that is open already. The frame of the last one is kept."""

    def __init__(self, work: WorkingBundle) -> None:
        self._work = work
        self.done: Done | None = None
        self.frame = b""

    async def train(self, job: TrainingJob, on_event: Callable[[Event], None]) -> Done:
        """See :class:`edge_runtime.device.trainer.Trainer`."""
        self.frame, done = await asyncio.to_thread(run_round, job, on_event, lambda *_: self._work)
        write_frame(job, self.frame)
        self.done = done
        return done


class SharedInspector:
    """Checks artifacts in this process, and a bundle that all devices share only once."""

    def __init__(self) -> None:
        self._bundles: dict[str, Reply] = {}

    async def ask(self, request: Request) -> Reply:
        """See :class:`edge_runtime.device.inspector.Inspector`."""
        if request.action != "bundle":
            return await asyncio.to_thread(handle, request)
        if request.digest not in self._bundles:
            self._bundles[request.digest] = await asyncio.to_thread(handle, request)
        return self._bundles[request.digest]


@dataclass(frozen=True)
class DeviceChoices:
    """What devices choose for themselves.

    Attributes:
        tiers: That they take, in turn: the first device the first one.
        remember_mb: What frozen blocks make of examples may take on each one's disk; None: what suits the disk.
    """

    tiers: tuple[int, ...] = (0,)
    remember_mb: int | None = None

    def tier(self, device: int) -> int:
        """The tier of device number ``device``."""
        return self.tiers[device % len(self.tiers)]


class Fleet:
    """The devices of one task. ``files`` are their training data, one a device."""

    def __init__(
        self,
        aggregator: Aggregator,
        work: WorkingBundle,
        folder: Path,
        files: tuple[Path, ...],
        *,
        seed: int,
        choices: DeviceChoices = DeviceChoices(),  # frozen
    ) -> None:
        self._aggregator = aggregator
        self._folder = folder
        self._files = files
        self.trainer = SharedTrainer(work)
        self._choices = choices
        self._inspector = SharedInspector()
        self._work = work
        entropy = random.Random(seed)  # a run must be repeatable; nothing here is a secret
        self._host = Host(entropy=entropy.randbytes, rng=entropy)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the devices."""
        return tuple(f"device-{number:02d}" for number in range(len(self._files)))

    async def enrol(self) -> None:
        """Make every device known, with the bundle in its home as if it had been downloaded."""
        task = self._aggregator.config.task.name
        for name, data in zip(self.names, self._files, strict=True):
            answer = await self._aggregator.members.make_token(wire.TokenRequest(name, 3600))
            key = Ed25519PrivateKey.from_private_bytes(self._host.entropy(32))
            signing_key = key.public_key().public_bytes_raw().hex()
            token = wire.Token.parse(answer.token)
            request = wire.Enrolment(token=token.secret, device=name, signing_key=signing_key)
            enrolled = await self._aggregator.members.enrol(request, task=task)
            home = self._home(name)
            home.save_identity(Identity("memory:", name, key.private_bytes_raw().hex(), task, enrolled.plan_key))
            home.save_settings(Settings(data=(str(data),)))
            link = home.bundle_path(self._work.bundle.digest)
            link.parent.mkdir(parents=True)
            link.symlink_to(self._work.bundle.folder.resolve())

    async def take_part(self, name: str) -> Result:
        """Let a device do the round that is open: fetch, train, seal, send.

        Raises:
            FleetError: its update did not count.
        """
        home, said = self._home(name), list[DeviceEvent]()
        transport = MemoryTransport(self._aggregator, name, self._work.bundle.manifest)
        before = home.state()
        tools = Tools(self.trainer, self._inspector, self._host, said.append)
        choices = self._choices
        tier = choices.tier(self.names.index(name))
        options = RunOptions(home.settings(), once=True, tier=tier, remember_mb=choices.remember_mb)
        await Device(home, transport, tools, options).run()
        trouble = [event for event in said if isinstance(event, Skipped | Waiting)]
        state = home.state()
        if trouble or state.counted != before.counted + 1 or self.trainer.done is None:
            raise FleetError(f"{name}: its update of round {state.seen_round} did not count: {trouble}")
        up, down = state.bytes_up - before.bytes_up, state.bytes_down - before.bytes_down
        return Result(name, self.trainer.done, up, down, transport.params_down, transport.head_down)

    def values(self, signed: wire.SignedPlan, layouts: Sequence[wire.Layout]) -> Values:
        """What the last device's update says has changed of what all tiers carry, shape (count of the weakest,)."""
        mine, least = wire.layout_for(self.trainer.frame, layouts), layouts[-1]
        parts = mine.split(self.update(signed, layouts).values)
        common = [parts[name][tuple(map(slice, shape))].ravel() for name, shape in least.blocks]
        return np.concatenate(common).astype(np.float32)

    def update(self, signed: wire.SignedPlan, layouts: Sequence[wire.Layout]) -> wire.Update:
        """The last device's update."""
        layout = wire.layout_for(self.trainer.frame, layouts)
        return wire.decode_update(self.trainer.frame, signed_plan=signed, layout=layout)

    def _home(self, name: str) -> Home:
        return Home(self._folder / name, KEY)
