"""A tiny bundle, an aggregator on loopback with a clock of its own, and devices that speak only the contract."""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloud import events
from cloud.config import Config, parse_config
from cloud.http import Server
from cloud.init import init_folder
from cloud.keys import KEYS_FOLDER, load_keys
from cloud.operator import OperatorClient
from cloud.planning import plan_layouts
from cloud.service import Surroundings
from edge_runtime import wire
from edge_runtime.bundle import (
    Block,
    BlockKind,
    Bundle,
    Embed,
    Head,
    Manifest,
    Module,
    Param,
    PeftInfo,
    Slot,
    Text,
    Vocabulary,
    adapter_shapes,
    encode_manifest,
    file_entry,
    open_bundle,
    write_tensors,
)
from edge_runtime.wire import resources
from edge_runtime.wire.requests import EMPTY_BODY

SERVE = "from cloud.commands import cloud; cloud(prog_name='emberlora cloud')"
ROOT = Path(__file__).parents[2]
START = 1_700_000_000.0
SLOTS = (Slot("q", 6, 4), Slot("v", 6, 3))


def make_bundle(folder: Path, *, task: str = "classify", r_max: int = 3, slots: tuple[Slot, ...] = SLOTS) -> Bundle:
    """Two blocks of non-square LoRA layers and, for a classifier, a trained head; the graphs are placeholders."""
    (folder / "graphs").mkdir(parents=True)
    files = {
        "graphs/embed.onnx": b"e",
        "graphs/block.onnx": b"b" * 5000,
        "graphs/head.onnx": b"h",
        "tokenizer.json": b"{}",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    rng = np.random.default_rng(7)
    write_tensors(folder / "weights.safetensors", {"w": rng.normal(size=(40, 500)).astype(np.float32)})
    classify = task == "classify"
    params = (Param("weight", (2, 6)), Param("bias", (2,))) if classify else ()
    manifest = Manifest(
        schema=2,
        model="tiny",
        task=task,  # type: ignore[arg-type]
        width=6,
        base="fp32",
        embed=Embed("graphs/embed.onnx", (), ("mask",)),
        kinds=(BlockKind("block", "graphs/block.onnx", (), slots, ("mask",)),),
        blocks=(Block("block", "layer.0"), Block("block", "layer.1")),
        head=Head(
            "graphs/head.onnx",
            "first" if classify else "target",
            (),
            module="classifier" if classify else None,
            vocabulary=None if classify else Vocabulary("graphs/head.onnx", ("w",)),
            params=params,
        ),
        modules=tuple(
            Module(f"layer.{i}.{s.name}", i, s.name, s.in_features, s.out_features) for i in range(2) for s in slots
        ),
        r_max=r_max,
        scale=2.0,
        text=Text(max_tokens=64, vocab_size=10, pad_id=0),
        peft=PeftInfo("tiny", "SEQ_CLS" if classify else "CAUSAL_LM", ("q", "v")),
        parameters=1000,
        files={},
        labels=("no", "yes") if classify else (),
    )
    shapes = adapter_shapes(manifest, dict.fromkeys(manifest.module_names, r_max))
    write_tensors(
        folder / "adapter.safetensors",
        {
            name: np.zeros(shape, np.float32) if name.endswith("lora_b") else rng.normal(size=shape).astype(np.float32)
            for name, shape in shapes.items()
        },
    )
    names = [*files, "weights.safetensors", "adapter.safetensors"]
    entries = {name: file_entry(folder / name) for name in names}
    manifest = Manifest(**{**_fields(manifest), "files": entries})
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return open_bundle(folder)


def _fields(manifest: Manifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in manifest.__struct_fields__}


@dataclass
class Clock:
    """Unix time that moves when told."""

    now: float = START

    def __call__(self) -> float:
        return self.now


@dataclass
class Site:
    """A folder with config and keys, and the server on it when one runs."""

    folder: Path
    bundle: Bundle
    config: Config
    clock: Clock = field(default_factory=Clock)
    events: list[events.Event] = field(default_factory=list)
    server: Server | None = None

    @classmethod
    def make(
        cls,
        folder: Path,
        *,
        bundle: Bundle | None = None,
        annealing: dict[str, object] | None = None,
        tiers: dict[str, object] | None = None,
        outliers: dict[str, object] | None = None,
        **task: object,
    ) -> Site:
        """A task of three rounds and two devices a round, if nothing else is asked."""
        bundle = bundle or make_bundle(folder / "bundle")
        init_folder(folder / "site", bundle=bundle.folder, task="tiny", force=False)
        table = {"name": "tiny", "bundle": "../bundle", "rounds": 3, "devices_per_round": 2, "min_devices": 1, **task}
        tables = {
            "task": table,
            "annealing": annealing or {},
            "tiers": tiers or {},
            "outliers": outliers or {},
            "server": {"port": 0, "request_timeout_s": 5},
        }
        text = "".join(
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
            for name, values in tables.items()
        )
        path = folder / "site" / "emberlora.toml"
        path.write_text(text)
        return cls(folder / "site", bundle, parse_config(text.encode(), path=path))

    async def start(self) -> Server:
        self.server = await Server.start(self.config, Surroundings(self.clock, secrets.token_bytes, self.events.append))
        return self.server

    async def close(self) -> None:
        if self.server is not None:
            await self.server.close()
        self.server = None

    async def restart(self) -> Server:
        await self.close()
        return await self.start()

    async def tick(self) -> None:
        assert self.server is not None
        await self.server.aggregator.tick()

    @property
    def operator(self) -> OperatorClient:
        return OperatorClient.of_folder(self.config.data_path, clock=self.clock, entropy=secrets.token_bytes)

    async def device(self, session: aiohttp.ClientSession, name: str) -> Device:
        """An enrolled device."""
        device = Device(self, session, name)
        token = wire.Token.parse((await self.operator.make_token(name, 60)).token)
        await device.enrol(token)
        return device

    def make_older(self, *without: str) -> None:
        """Give the folder, on which no server runs, to a version of schema 3 from before these tables."""
        with closing(sqlite3.connect(self.config.data_path / "emberlora.sqlite3")) as connection:
            for table in (*without, "alembic_version"):
                connection.execute(f"DROP TABLE {table}")
            connection.execute("UPDATE identity SET schema = 3")
            connection.commit()

    def files(self) -> dict[str, bytes]:
        """What the task's blobs are on disk, by path."""
        root = self.config.data_path / "blobs"
        return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    def operator_key(self) -> Ed25519PrivateKey:
        return load_keys(self.config.data_path / KEYS_FOLDER).operator


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def problem(self) -> str:
        """The name of the error the answer stands for."""
        return type(wire.decode_problem(self.body, status=self.status)).__name__


@dataclass
class Device:
    """The contract's device side, without any training."""

    site: Site
    session: aiohttp.ClientSession
    name: str
    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    def head(self, method: str, target: str, body: bytes = b"", **changes: object) -> dict[str, str]:
        """The signed header; ``changes`` replace what is signed."""
        digest = hashlib.sha256(body).hexdigest() if body else EMPTY_BODY
        parts: dict[str, Any] = {
            "device": self.name,
            "method": method,
            "target": target,
            "body_digest": digest,
            "time": int(self.site.clock()),
            "nonce": secrets.token_hex(16),
        } | changes
        return {"Authorization": wire.authorization(wire.SignedRequest(**parts), self.key)}

    async def send(self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        assert self.site.server is not None
        headers = self.head(method, target, body) if headers is None else headers
        async with self.session.request(
            method, self.site.server.url + target, data=body or None, headers=headers
        ) as response:
            return Answer(response.status, dict(response.headers), await response.read())

    async def enrol(self, token: wire.Token) -> wire.Enrolled:
        key = self.key.public_key().public_bytes_raw().hex()
        body = wire.encode_message(wire.Enrolment(token=token.secret, device=self.name, signing_key=key))
        answer = await self.send("POST", resources.ENROLMENTS, body, headers={})
        if answer.status >= 400:
            raise wire.decode_problem(answer.body, status=answer.status)
        enrolled = wire.decode_message(answer.body, wire.Enrolled)
        assert hashlib.sha256(bytes.fromhex(enrolled.plan_key)).hexdigest() == token.fingerprint
        self.plan_key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(enrolled.plan_key))
        return enrolled

    async def plan(self, *, after: int = -1, wait_s: int = 20) -> wire.SignedPlan | None:
        answer = await self.send("GET", resources.plan_target("tiny", after=after, wait_s=wait_s))
        if answer.status == 204:
            return None
        assert answer.status == 200, answer
        return wire.open_plan(answer.body, self.plan_key)

    def frame(
        self, signed: wire.SignedPlan, values: np.ndarray, *, weight: int = 10, tier: int = 0, **metrics: Any
    ) -> bytes:
        update = wire.Update(values.astype(np.float32), weight, wire.LocalMetrics(**metrics, tier=tier))
        layout = plan_layouts(self.site.bundle, signed.plan)[tier]
        return wire.encode_update(update, signed_plan=signed, layout=layout)

    def seal(self, signed: wire.SignedPlan, frame: bytes) -> bytes:
        context = wire.EnvelopeContext.of(signed, self.name)
        return wire.seal(frame, round_key=signed.plan.round_key, context=context)

    async def put(self, signed: wire.SignedPlan, sealed: bytes) -> Answer:
        return await self.send("PUT", resources.update_path("tiny", signed.plan.round, self.name), sealed)

    async def patch(self, round_: int, *, since: int, plain: bool = False) -> Answer:
        """A patch; a plain one, as a device is sent that reads nothing else."""
        target = resources.patch_target("tiny", round_, since=since)
        return await self.send("GET", target.partition("&")[0] if plain else target)

    async def blob(self, digest: str, **headers: str) -> Answer:
        target = resources.BLOB.format(digest=digest)
        return await self.send("GET", target, headers=self.head("GET", target) | headers)


def values_for(site: Site, signed: wire.SignedPlan, seed: int, *, tier: int = 0) -> np.ndarray:
    """A random change for a plan, float32, shape (count,)."""
    count = plan_layouts(site.bundle, signed.plan)[tier].count
    return np.random.default_rng(seed).normal(scale=0.1, size=count).astype(np.float32)


@dataclass
class Remote:
    """Stands where a Server stands, for a server in another process."""

    url: str


def spawn(site: Site) -> subprocess.Popen[str]:
    """A real server process on a site."""
    command = [sys.executable, "-c", SERVE, "serve", "--config", str(site.folder), "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    site.server = Remote(json.loads(process.stdout.readline())["url"])  # type: ignore[assignment]
    return process
