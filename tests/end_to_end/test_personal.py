"""A task whose devices keep parameters for themselves: the real aggregator and real devices in one process, whose every
body is looked through. Invariants: nothing of what a device keeps is in anything it sends, nor in anything it is sent;
what is shared is the same on all devices, what is kept is not; and each is better served by its own."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from bench.federation.fleet import KEY, Fleet, SharedInspector, SharedTrainer
from bench.federation.transport import MemoryTransport
from cloud.config import parse_config
from cloud.keys import KEYS_FOLDER, load_keys, make_keys
from cloud.service import Aggregator, Surroundings
from edge_runtime import wire
from edge_runtime.bundle import Array, open_bundle, read_peft_folder
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from edge_runtime.device.loop import Device, RunOptions, Tools
from edge_runtime.device.records import Pending, Settings
from edge_runtime.engine.runtime import start_runtime
from edge_runtime.training.carried import read_carried
from edge_runtime.training.local import evaluate
from edge_runtime.training.session import WorkingBundle
from edge_runtime.wire.envelope import EnvelopeContext
from edge_runtime.wire.patch_frame import VERSION

LABELS = ("asyncio", "email", "tkinter", "xml")
ROUNDS = 3
DEVICES = ("device-00", "device-01")


@dataclass
class Bodies:
    """What went over the line: updates as sent and as opened by the aggregator, patches, and whole blobs asked for."""

    sealed: list[bytes] = field(default_factory=list)
    frames: dict[tuple[int, str], bytes] = field(default_factory=dict)
    patches: list[bytes] = field(default_factory=list)
    blobs: list[str] = field(default_factory=list)


class Watched(MemoryTransport):
    """Keeps every body."""

    bodies: Bodies

    async def upload(self, pending: Pending, sealed: bytes) -> wire.UpdateReceipt:
        data, work = sealed, self._aggregator._work
        assert work is not None
        context = EnvelopeContext.of(work.signed, self._device)
        self.bodies.sealed.append(data)
        self.bodies.frames[pending.round, self._device] = wire.unseal(data, round_key=work.key, context=context)
        return await super().upload(pending, sealed)

    @contextlib.asynccontextmanager
    async def patch(self, task: str, round_: int, *, since: int) -> AsyncIterator[AsyncIterator[bytes]]:
        asked = {"task": task, "round_": round_, "since": since, "reads": VERSION}
        self.bodies.patches.append(await self._aggregator.patch(self._device, **asked))
        async with super().patch(task, round_, since=since) as pieces:
            yield pieces

    @contextlib.asynccontextmanager
    async def blob(self, digest: str, *, offset: int) -> AsyncIterator[object]:  # type: ignore[override]
        self.bodies.blobs.append(digest)
        async with super().blob(digest, offset=offset) as answer:
            yield answer


@dataclass
class Site:
    aggregator: Aggregator
    work: WorkingBundle
    folder: Path
    bodies: Bodies
    kept: list[dict[str, Array]]  # of every device after every round

    def home(self, name: str) -> Home:
        return Home(self.folder / "devices" / name, KEY)

    async def live(self, name: str, *, once: bool) -> None:
        """A device's process: one round, or to the end."""
        home = self.home(name)
        transport = Watched(self.aggregator, name, self.work.bundle.manifest)
        transport.bodies = self.bodies
        held_out = (str(self.folder / f"{name}-held-out.jsonl"),)
        settings = Settings(home.settings().data, held_out)
        tools = Tools(SharedTrainer(self.work), SharedInspector(), Host(), lambda event: None)
        await Device(home, transport, tools, RunOptions(settings, once=once, wait_s=0)).run()

    def accuracy(self, adapter: dict[str, Array], name: str) -> float:
        data = self.work.dataset([self.folder / f"{name}-held-out.jsonl"], max_tokens=16, skip_bad=False)
        self.work.engine.use(self.work.none_alive(adapter))
        score = evaluate(self.work.engine, data)
        return score.correct / score.rows


def kept_by(home: Home) -> dict[str, Array]:
    """The device's own tensors, by name."""
    return read_carried(home.vault(), "personal", home.personal)


def write_data(path: Path, turn: int, count: int, *, seed: int) -> Path:
    """Words tell labels, and every device calls them otherwise: what one learns in its head is wrong for the other."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for index in range(count):
            kind = index % len(LABELS)
            words = " ".join(f"word{kind * 10 + int(word)}" for word in rng.integers(0, 10, size=6))
            file.write(json.dumps({"text": words, "label": LABELS[(kind + turn) % len(LABELS)]}) + "\n")
    return path


async def run_task(folder: Path, bundle: Path, task: dict[str, object]) -> Site:
    """All rounds and the end, both devices in each."""
    tables = {
        "task": {"name": "t", "bundle": str(bundle), "rounds": ROUNDS, "devices_per_round": 2, **task},
        "training": {"max_tokens": 16, "epochs": 3, "lr_a": 1e-2, "lr_b": 1e-2, "lr_head": 1e-2},
    }
    text = "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for name, values in tables.items()
    )
    config = parse_config(text.encode(), path=folder / "emberlora.toml")
    config.data_path.mkdir(mode=0o700)
    make_keys(config.data_path / KEYS_FOLDER)
    opened = open_bundle(bundle)
    work = WorkingBundle(opened, threads=start_runtime())
    surroundings = Surroundings(time.time, secrets.token_bytes, lambda event: None)
    keys = load_keys(config.data_path / KEYS_FOLDER)
    aggregator = Aggregator(config, opened, keys=keys, folder=config.data_path, surroundings=surroundings)
    await aggregator.start()
    files = []
    for number, name in enumerate(DEVICES):
        files.append(write_data(folder / f"{name}.jsonl", number, 80, seed=number))
        write_data(folder / f"{name}-held-out.jsonl", number, 40, seed=10 + number)
    await Fleet(aggregator, work, folder / "devices", tuple(files), seed=0).enrol()
    site = Site(aggregator, work, folder, Bodies(), [])
    try:
        for _ in range(ROUNDS):
            for name in DEVICES:
                await site.live(name, once=True)
                site.kept.append(kept_by(site.home(name)))
            await aggregator.tick()
        for name in DEVICES:
            await site.live(name, once=False)
    finally:
        await aggregator.close()
    return site


def pairs(array: Array) -> set[bytes]:
    """Every two neighbouring values that are not zero, as bytes: hardly two tensors have one in common."""
    flat = np.ascontiguousarray(array, "<f4").reshape(-1)
    return {flat[i : i + 2].tobytes() for i in range(len(flat) - 1) if flat[i : i + 2].all()}


def secrets_of(site: Site, initial: dict[str, Array]) -> set[bytes]:
    """Values and changes of everything that was ever kept, from round to round and from the start."""
    found: set[bytes] = set()
    for number in range(len(DEVICES)):
        mine = site.kept[number :: len(DEVICES)]
        for before, after in zip([initial, *mine], mine, strict=False):
            for name, array in after.items():
                found |= pairs(array) | pairs(array - before[name]) | pairs(array - initial[name])
    return found


@pytest.mark.parametrize(
    ("task", "own"),
    [
        ({"personal": ["head"]}, "classifier."),
        ({"personal": ["B"], "aggregation": "a-only"}, ".lora_b"),
        ({"personal": ["B", "head"], "aggregation": "a-only", "upload": "int8"}, "classifier. .lora_b"),
        ({"personal": ["head"], "download": "int8"}, "classifier."),
    ],
    ids=["head", "B", "both", "rounded downloads"],
)
async def test_what_is_kept_never_travels(bert_bundle: Path, tmp_path: Path, task: dict[str, object], own: str) -> None:
    site = await run_task(tmp_path, bert_bundle, task)
    bundle = site.work.bundle
    initial = bundle.initial_adapter()
    names = {name for name in initial if any(part in name for part in own.split())}

    # What the homes keep: all of it, trained, and on every device another.
    one, two = (kept_by(site.home(name)) for name in DEVICES)
    assert set(one) == set(two) == names
    for name in names:
        assert np.abs(one[name] - initial[name]).max() > 0
        assert np.abs(one[name] - two[name]).max() > 1e-3

    # What was sent: frames of exactly the shared tensors, in which nothing that was kept occurs.
    secret = secrets_of(site, initial)
    assert len(secret) > 200
    assert len(site.bodies.frames) == len(site.bodies.sealed) == 2 * ROUNDS
    for frame in site.bodies.frames.values():
        assert not [pattern for pattern in secret if pattern in frame]
    for sealed in site.bodies.sealed:
        assert not [pattern for pattern in secret if pattern in sealed]

    # What came down: no component of it is marked, let alone held, in any patch, and nothing was fetched whole.
    assert len(site.bodies.patches) >= 2 * ROUNDS
    assert site.bodies.blobs == []
    manifest = bundle.manifest
    ranks = dict.fromkeys(manifest.module_names, manifest.r_max)
    blocks = wire.adapter_layout(ranks, manifest.features, manifest.head_shapes).blocks
    sides = {name: shape[name.endswith("lora_b")] if len(shape) == 2 else 1 for name, shape in blocks}
    order = [name for name, components in sides.items() for _ in range(components)]
    for data in site.bodies.patches:
        assert not [pattern for pattern in secret if pattern in data]
        marks = np.unpackbits(np.frombuffer(data, np.uint8, -(-len(order) // 8), 56), bitorder="little")
        assert not {name for name, mark in zip(order, marks, strict=False) if mark} & names

    # What the users get: the shared part is one, their own part is theirs, and the aggregator's is as it began.
    folders = [read_peft_folder(site.home(name).published_folder, bundle.manifest) for name in DEVICES]
    shared = read_peft_folder(site.folder / "data" / "published", bundle.manifest)
    for name, array in shared.items():
        for kept, folder in zip((one, two), folders, strict=True):
            np.testing.assert_array_equal(folder[name], kept[name] if name in names else array)
        if name in names:
            np.testing.assert_array_equal(array, initial[name])
    assert any((shared[name] != initial[name]).any() for name in shared)

    # And it serves: devices that call the same things by other names agree with their own adapter alone.
    for mine, other, name in zip(folders, folders[::-1], DEVICES, strict=True):
        assert site.accuracy(mine, name) > 0.8
        assert site.accuracy(mine, name) > site.accuracy(other, name) + 0.3
