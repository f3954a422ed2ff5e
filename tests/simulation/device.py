"""A device's side of a scenario: the real loop on a home of its own, the training alone made up."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors.numpy import load_file

from cloud.service import Aggregator
from edge_runtime import wire
from edge_runtime.at_rest import StorageKey
from edge_runtime.device.artifacts import Reply, Request, handle
from edge_runtime.device.errors import TransportError
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from edge_runtime.device.loop import Device, RunOptions, Tools
from edge_runtime.device.records import Identity, Settings
from edge_runtime.training.job import Done, Event, Stepped, TrainingJob
from edge_runtime.training.round import write_frame
from edge_runtime.wire import LocalMetrics, SignedPlan, Update, encode_update, open_plan, tier_layouts
from tests.simulation.ledger import WEIGHTS, Forged, Ledger, Seen
from tests.simulation.link import Link, Network, Weather, check_caller
from tests.simulation.loop import Process, SimulatedLoop
from tests.simulation.server import START, ServerDownError

KEY = StorageKey(bytes(range(32)))
_WAIT_S = 20  # a held poll
_BACKOFF_CAP_S = 8.0


@dataclass
class Gate:
    """Something that waits until it is let through: so many times, or for good once it is open."""

    permits: int = 0
    open: bool = False
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def let(self) -> None:
        """Let one through, now or later."""
        self.permits = 1
        self._changed.set()

    def open_up(self) -> None:
        """Let all through from now on."""
        self.open = True
        self._changed.set()

    async def passed(self) -> None:
        """Wait for it."""
        while not (self.open or self.permits):
            self._changed.clear()
            await self._changed.wait()
        self.permits = 0


class InProcessInspector:
    """Checks artifacts here; the bundle, which all devices share, only once."""

    def __init__(self) -> None:
        self._bundles: dict[str, Reply] = {}

    async def ask(self, request: Request) -> Reply:
        """See :class:`edge_runtime.device.inspector.Inspector`."""
        if request.action != "bundle":
            return handle(request)
        if request.digest not in self._bundles:
            self._bundles[request.digest] = handle(request)
        return self._bundles[request.digest]


class Actor:
    """One device, over all its processes and enrolments."""

    def __init__(self, number: int, folder: Path, network: Network, *, loop: SimulatedLoop, rng: random.Random) -> None:
        self.number, self.name = number, f"device-{number}"
        self.training, self.uploading = Gate(), Gate()
        self.in_parts = False
        self.enrolled = False  # as its identity says
        self.forge: Forged | None = None
        self.full = self.was_full = False
        self.process: Process | None = None
        self.home = Home(folder / f"{self.name}.0", KEY)
        self.weather = Weather()
        self._parent, self._network, self._loop, self._rng = folder, network, loop, rng
        self._token: wire.Token | None = None
        self._inspector = InProcessInspector()
        self.skew_s = 0.0
        self._host = Host(clock=lambda: START + loop.time() + self.skew_s, entropy=rng.randbytes, rng=rng)

    @property
    def up(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and not self.process.dead

    @property
    def key(self) -> str:
        """The public key of its identity, hex; empty while it has none."""
        identity = self.home.stored_identity()
        return "" if identity is None else identity.signing_key().public_key().public_bytes_raw().hex()

    # Life

    async def join(self) -> None:
        """Enrol as :func:`edge_runtime.device.enrolment.enrol` does, with another transport; then start."""
        if self.enrolled or self.up:
            return
        link, server = Link(self._network, self), self._network.server
        try:
            if self._token is None:
                request = wire.TokenRequest(self.name, 3600)
                self._token = wire.Token.parse((await server.call(lambda a: a.members.make_token(request))).token)
            identity = self.home.stored_identity() or Identity("memory:", self.name, self._rng.randbytes(32).hex())
            self.home.save_identity(identity)
            enrolment = wire.Enrolment(self._token.secret, self.name, self.key)
            enrolled = await link.ask("enrol", lambda a: a.members.enrol(enrolment, task=server.task_name))
        except wire.TokenError:
            self._token = None  # another one next time
        except (ServerDownError, TransportError, wire.WireError):
            pass  # its user tries again
        else:
            self._token = None
            self.home.save_identity(
                Identity(identity.server, self.name, identity.private_key, enrolled.task, enrolled.plan_key)
            )
            self.enrolled = True
            self._network.left.discard(self.name)
            self._link_bundle()
            await self.start()

    def _link_bundle(self) -> None:
        """Device 0 downloads the bundle; the others have it, which is quicker."""
        bundle = self._network.server.bundle
        link = self.home.bundle_path(bundle.digest)
        if self.number and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(bundle.folder.resolve())

    async def leave(self) -> None:
        """Stop, and leave as :func:`edge_runtime.device.enrolment.leave` does."""
        if not self.enrolled:
            return
        await self.stop()
        self._network.left.add(self.name)
        key = self.key

        async def ask(aggregator: Aggregator) -> None:
            check_caller(aggregator, self.name, key)
            await aggregator.members.leave(self.name, by=self.name)

        try:
            with contextlib.suppress(wire.UnknownDeviceError):
                await Link(self._network, self).ask("leave", ask)
        except (TransportError, wire.WireError):
            return  # its user tries again
        self.home.forget()
        self.enrolled = False
        self._network.ledger.device_rounds.pop(self.number, None)

    async def start(self) -> None:
        """Start on the home, if it does not run."""
        if self.up or not self.enrolled:
            return
        self.process = process = Process(self._loop, self.name, self._keep_files)
        process.full = self.full
        tools = Tools(_Trainer(self), self._inspector, self._host, lambda event: None)
        options = RunOptions(
            Settings(data=("data.jsonl",)), wait_s=_WAIT_S, backoff_cap_s=_BACKOFF_CAP_S, memory_budget_mb=1024
        )
        process.spawn(self._run(process, tools, options))

    async def _run(self, process: Process, tools: Tools, options: RunOptions) -> None:
        try:
            await Device(self.home, Link(self._network, self, process), tools, options).run()
        except OSError as error:
            if not (error.errno == errno.ENOSPC and self.was_full):
                self._surprise(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the scenario looks for it
            self._surprise(error)
        process.end()

    def _surprise(self, error: Exception) -> None:
        if not (isinstance(error, wire.UnknownDeviceError) and self.name in self._network.left):
            self._network.ledger.surprises.append(f"{self.name}: {error!r}")

    async def stop(self) -> None:
        """End in good order, as a signal does."""
        process = self.process
        if process is not None and not process.dead:
            for task in process.tasks:
                task.cancel()
            await asyncio.wait({*process.tasks, process.died}, return_when=asyncio.FIRST_COMPLETED)
            process.end()

    def fill(self, full: bool) -> None:
        """Let the disk be full, or have room again."""
        self.full = full
        self.was_full |= full
        if self.process is not None:
            self.process.fill(full)

    def _keep_files(self) -> None:
        number = int(self.home.folder.suffix[1:]) + 1
        kept = self._parent / f"{self.name}.{number}"
        shutil.copytree(self.home.folder, kept, symlinks=True)
        self.home = Home(kept, KEY)

    # Training

    def check(self) -> None:
        """What it has seen never becomes less."""
        if self.enrolled:
            self._network.ledger.obeys(self.number, self.home.state().seen_round, "has seen")

    def contribute(self, job: TrainingJob, signed: SignedPlan) -> Done:
        """Write the frame of the ledger's contribution, or of a bad one."""
        bundle, ledger, round_ = self._network.server.bundle, self._network.ledger, signed.plan.round
        layout = tier_layouts(signed.plan, features=bundle.manifest.features, places={}, head={})[0]
        forge, self.forge = self.forge, None
        training = ledger.trained(self.number, round_, forge)
        values = np.zeros(layout.count, np.float32)
        training.write(values)
        if forge == "nan":
            values[self.number] = np.nan
        weight = 0 if forge == "weight" else WEIGHTS[self.number]
        update = Update(values, weight, LocalMetrics(steps=1, loss_start=2.0, loss_end=1.0, seconds=0.5))
        if forge == "plan":
            signed = SignedPlan(signed.data, signed.plan, hashlib.sha256(b"another").hexdigest())
        frame = encode_update(update, signed_plan=signed, layout=layout)
        write_frame(job, frame[:-8] if forge == "short" else frame)
        self.weather.spoil = forge == "sealed"
        return Done(WEIGHTS[self.number], update.metrics)

    @property
    def ledger(self) -> Ledger:
        """Where it is written down."""
        return self._network.ledger


class _Trainer:
    """Implements :class:`edge_runtime.device.trainer.Trainer`."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    async def train(self, job: TrainingJob, on_event: Callable[[Event], None]) -> Done:
        """Check what the device prepared, wait until the scenario lets it end, and contribute."""
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(job.plan_key))
        signed = open_plan(Path(job.plan).read_bytes(), key)
        assert Path(job.adapter).stem == signed.plan.adapter
        ledger = self._actor.ledger
        ledger.obeys(self._actor.number, signed.plan.round, "trains for")
        ledger.seen.append(Seen(self._actor.number, signed.plan.round, load_file(job.adapter)))
        on_event(Stepped(1, 1, 2.0))
        await self._actor.training.passed()
        return self._actor.contribute(job, signed)
