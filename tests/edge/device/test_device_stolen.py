"""Whoever takes a device's folder learns nothing of its texts from it, at whatever instant it was taken.

Invariant: at no instant between enrolment and the end of a round does any file below the home hold, in the clear, a
value of an update, what an update left out, a personal value, or a byte of a private key or the storage key.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
from device_bench import Bench
from device_server import Aggregator
from test_device_processes import PATIENCE_S, start, until

from edge_runtime import wire
from edge_runtime.at_rest import AtRestError, Vault, is_encrypted
from edge_runtime.bundle import parse_tensors
from edge_runtime.device import events
from edge_runtime.device.errors import StorageKeyError
from edge_runtime.device.home import Home
from edge_runtime.device.outbox import Outbox
from edge_runtime.device.records import Pending, Settings
from edge_runtime.device.trainer import ChildTrainer
from edge_runtime.training.job import TrainingJob
from tests.edge.encrypted import KEY

WINDOW = 16  # bytes of a secret that are looked for


@dataclass
class Watch:
    """Looks through a home whenever a file is about to be synced, renamed or removed: what a kill there would leave."""

    home: Path
    secrets: dict[str, list[bytes]] = field(default_factory=dict)  # name -> windows
    seen: set[str] = field(default_factory=set)  # names of files
    found: list[str] = field(default_factory=list)
    instants: int = 0

    def hide(self, name: str, secret: bytes) -> None:
        """From now on these bytes must not be found, neither as they are nor as text."""
        forms = (secret, secret.hex().encode(), base64.b64encode(secret)[:-4])
        self.secrets.setdefault(name, []).extend(form[:WINDOW] for form in forms if len(form) >= WINDOW)

    def hide_values(self, name: str, values: bytes) -> None:
        """Parts of a longer secret, from its begin to its end."""
        last = max(0, len(values) - WINDOW)
        parts = {values[at : at + WINDOW] for at in (0, last // 3, last * 2 // 3, last)}
        self.secrets.setdefault(name, []).extend(parts)

    def look(self) -> None:
        """Read every file of the home."""
        self.instants += 1
        for path in self.home.rglob("*"):
            if path.is_file():
                self.seen.add(path.name.removesuffix(".partial"))
                data = path.read_bytes()
                self.found += [
                    f"{name} in {path}" for name, parts in self.secrets.items() if any(p in data for p in parts)
                ]


@pytest.fixture
def watch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch(bench.home.folder)
    watch.hide("storage key", KEY.secret)
    watch.hide("signing key", bytes.fromhex(bench.home.identity().private_key))
    watch.hide("hex of the signing key", bench.home.identity().private_key.encode())
    for name in ("fsync", "replace", "unlink"):
        watched(watch, name, monkeypatch)
    encrypt = Vault.encrypt

    def known(self: Vault, data: bytes, purpose: str, **more: object) -> bytes:
        """What goes in must not be found outside; tensors' names are everyone's, so only their values count."""
        watch.hide_values(purpose, private_part(data, purpose))
        return encrypt(self, data, purpose, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Vault, "encrypt", known)
    bench.trainer.rng = np.random.default_rng(11)
    return watch


def watched(watch: Watch, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., object] = getattr(os, name)

    def look_first(*arguments: object, **more: object) -> object:
        watch.look()
        return real(*arguments, **more)

    monkeypatch.setattr(os, name, look_first)


def private_part(data: bytes, purpose: str) -> bytes:
    if purpose in ("residual", "personal"):
        return b"".join(array.tobytes() for array in parse_tensors(data, what=purpose).values())
    if purpose == "frame":
        return data[148:]  # its header is what the signed plan says
    if purpose == "record":  # the digest of the plan, which is in it, is known to everyone
        return msgspec.json.decode(data, type=Pending).digest.encode()
    return data


def plan(aggregator: Aggregator, *, codes: bool) -> None:
    """Four rounds in which B is the devices' own, or all is sent in int4 and what is left out is kept."""
    aggregator.rounds = 4
    if codes:
        aggregator.quantisation = wire.Quantisation(4, (1.4, 1.4))
    else:
        aggregator.personal = ("B",)
    aggregator.plans.clear()
    aggregator._open()


@pytest.mark.parametrize("codes", [False, True])
async def test_no_file_ever_shows_what_was_learned(bench: Bench, watch: Watch, codes: bool) -> None:
    plan(bench.aggregator, codes=codes)
    kept = "residual" if codes else "personal"
    await bench.run(once=True, limit_s=60)
    await bench.run(once=True, limit_s=60)  # and what the first round left, at work in the second
    assert bench.home.state().counted == 2
    watch.look()
    assert watch.found == []
    names = {"update.encrypted", "round-0.sealed", "round-1.record", f"round-1.{kept}", f"{kept}.encrypted"}
    assert names | {"identity.json", "state.json"} <= watch.seen
    assert watch.instants > 20
    assert set(watch.secrets) >= {"frame", "update", "record", kept}
    assert all(watch.secrets.values())


async def test_the_watch_finds_what_is_in_the_clear(bench: Bench, watch: Watch) -> None:
    """The same look at a home that encrypts nothing."""
    plan(bench.aggregator, codes=False)
    await bench.run(once=True, limit_s=60)
    assert watch.found == []
    (bench.home.folder / "old").write_bytes(bench.home.vault().read(bench.home.personal, "personal"))
    watch.look()
    assert [line.split()[0] for line in watch.found] == ["personal"]


async def test_a_stolen_journal_yields_no_update(bench: Bench, tmp_path: Path) -> None:
    """Not even to who has the private key of its round as well, such as an aggregator's stolen disk."""
    plan(bench.aggregator, codes=False)
    bench.aggregator.faults.away_for = {"PUT"}
    bench.stop_at(events.Waiting)
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    stolen = Path(shutil.copytree(bench.home.folder, tmp_path / "stolen"))
    context = wire.EnvelopeContext.of(bench.aggregator.plans[-1], "pi-1")
    journal = sorted((stolen / "outbox").iterdir())
    assert [path.name for path in journal] == ["round-0.personal", "round-0.record", "round-0.sealed"]
    for path in journal:
        data = path.read_bytes()
        assert is_encrypted(data)
        for start_ in range(len(data)):  # wherever in the file an envelope might begin
            with pytest.raises(wire.EnvelopeError):
                wire.unseal(data[start_:], round_key=bench.aggregator.round_key, context=context)
    for key in (None, KEY.__class__(bytes(32))):
        thief = Home(stolen, key)
        assert thief.membership().device == "pi-1"
        with pytest.raises(StorageKeyError):
            thief.identity()
        with pytest.raises((StorageKeyError, AtRestError)):
            Outbox(thief.outbox, thief.vault()).first()
    # With the storage key it is an update: the check above looked at the right bytes.
    outbox = Outbox(stolen / "outbox", Home(stolen, KEY).vault())
    pending = outbox.first()
    assert pending is not None
    assert wire.unseal(outbox.sealed(pending), round_key=bench.aggregator.round_key, context=context)


@pytest.mark.not_emulated("looks at the processes of this machine")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_the_childs_keys_are_in_no_list_of_processes(bench: Bench, tmp_path: Path) -> None:
    """Nor in its environment or a file; it was given them, and they are those of its own files."""
    caught: list[TrainingJob] = []

    def stop(job: TrainingJob) -> None:
        caught.append(job)
        raise asyncio.CancelledError

    bench.trainer.before = stop
    with pytest.raises(asyncio.CancelledError):
        await bench.run()
    data, out = tmp_path / "data", tmp_path / "out"
    data.write_text("hang")
    out.mkdir()
    job = msgspec.structs.replace(caught[0], data=(str(data),), out=str(out))
    assert set(job.grant.keys) == {"frame", "residual", "personal", "importance", "remembered", "checkpoint"}
    standin = str(Path(__file__).with_name("device_standin.py"))
    training = asyncio.ensure_future(ChildTrainer((sys.executable, standin)).train(job, lambda _: None))
    pid_file = tmp_path / "pid"
    await until(lambda: pid_file.exists() and pid_file.read_text(), "the child trains")
    process = Path("/proc", pid_file.read_text())
    shown = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
    shown += b"".join(path.read_bytes() for path in out.rglob("*"))
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
    assert b"device_standin" in shown
    assert not [key for key in (*job.grant.keys.values(), KEY.text()) if key.encode() in shown]


async def test_a_device_killed_in_its_processes_leaves_nothing_readable(bench: Bench, tmp_path: Path) -> None:
    """SIGKILL while the child trains, and once more when the update waits."""
    data = tmp_path / "mine.jsonl"
    data.write_text("hang")
    bench.home.save_settings(Settings(data=(str(data),)))
    bench.aggregator.faults.away_for = {"PUT"}
    watch = Watch(bench.home.folder)
    watch.hide("storage key", KEY.secret)
    watch.hide("signing key", bytes.fromhex(bench.home.identity().private_key))
    watch.hide_values("values of the update", np.full(64, 0.25, np.float32).tobytes())
    pid_file = data.with_name("pid")
    process = await start(bench)
    await until(lambda: pid_file.exists() and pid_file.read_text(), "the child trains")
    process.kill()
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    await asyncio.wait_for(process.communicate(), PATIENCE_S)
    watch.look()
    data.write_text("well")
    process = await start(bench)
    await until(lambda: (bench.home.outbox / "round-0.record").exists(), "the update is journaled")
    process.kill()
    await asyncio.wait_for(process.communicate(), PATIENCE_S)
    watch.look()
    assert {"round-0.record", "round-0.sealed"} <= watch.seen
    assert watch.found == []
