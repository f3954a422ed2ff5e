"""Bundles and adapters from the network into the home: resumed when cut, verified before they get their name.

What has its final name in ``bundles/`` or ``adapters/`` was verified; it is checked again when a process uses it for
the first time, because disks rot, and fetched again when it has changed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

from edge_runtime.device.artifacts import Request
from edge_runtime.device.errors import (
    ArtifactDigestError,
    ArtifactError,
    ArtifactFormatError,
    FloorError,
    TransportError,
)
from edge_runtime.device.files import file_digest, make_folder, sync_folder
from edge_runtime.device.floors import Floors
from edge_runtime.device.home import Home
from edge_runtime.device.inspector import Inspector, demand
from edge_runtime.device.patching import Base, Patcher
from edge_runtime.device.records import DeviceState
from edge_runtime.device.transport import Transport
from edge_runtime.wire import NotFoundError, Plan
from edge_runtime.wire.patch_frame import OWN

# Stated again because edge_runtime.bundle needs numpy, which the resident process does without; a test compares them.
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20


async def fetch_blob(client: Transport, digest: str, target: Path, *, max_bytes: int) -> None:
    """Download a blob to ``target``, going on where an earlier attempt was cut.

    Bytes that turn out wrong are deleted and fetched once more.

    Raises:
        ArtifactDigestError: wrong twice.
        ArtifactError: the server does not have it, or no longer.
        TransportError: cut; what arrived is kept for the next call.
        WireError: the server's refusal.
    """
    partial = target.with_name(target.name + ".partial")
    for _ in range(2):
        await _fill(client, digest, partial, max_bytes=max_bytes)
        if await asyncio.to_thread(_sealed_digest, partial) == digest:
            partial.replace(target)
            sync_folder(target.parent)
            return
        partial.unlink()
    raise ArtifactDigestError(f"blob {digest[:12]}: the server sent other bytes than the plan names, twice")


async def _fill(client: Transport, digest: str, partial: Path, *, max_bytes: int) -> None:
    """Append what is missing; stops past ``max_bytes``, which no digest survives."""
    partial.touch(mode=0o600)
    offset = partial.stat().st_size
    received = 0
    try:
        async with client.blob(digest, offset=offset) as answer:
            if answer.start not in (0, offset):
                partial.unlink()
                raise TransportError(f"blob {digest[:12]}: the answer begins at {answer.start}: expected {offset}")
            with partial.open("ab" if answer.start else "wb") as file:
                async for piece in answer.pieces:
                    received += len(piece)
                    file.write(piece)
                    if file.tell() > max_bytes:
                        break
    except TransportError as error:
        error.progress = received > 0
        raise
    except NotFoundError as error:
        raise ArtifactError(f"blob {digest[:12]}: the server does not have it: {error}") from error


def _sealed_digest(path: Path) -> str:
    """Make a file durable and hash it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_digest(path)


class Store:
    """The home's bundles and adapters, filled from the network."""

    def __init__(self, home: Home, client: Transport, inspector: Inspector, floors: Floors) -> None:
        self._home = home
        self._client = client
        self._inspector = inspector
        self._floors = floors
        self._patcher = Patcher(client, inspector)
        self._checked: set[str] = set()  # bundles verified by this process

    async def bundle(self, digest: str) -> Path:
        """The folder of a verified bundle.

        Raises:
            ArtifactError: bad bytes, or not a bundle.
            FloorError: larger than this device allows.
            TransportError, WireError: see :func:`fetch_blob`.
        """
        folder = self._home.bundle_path(digest)
        if digest in self._checked:
            return folder
        if folder.exists() and (await self._inspector.ask(Request("bundle", str(folder), digest))).error:
            shutil.rmtree(folder)
        if not folder.exists():
            await self._fetch_bundle(digest, folder)
        self._checked.add(digest)
        return folder

    async def adapter(self, plan: Plan, state: DeviceState) -> Path:
        """The file of the plan's adapter: right digest, and tensors of the shapes the plan's ranks give, all finite.

        What is not here is made from the newest adapter that is and a patch, or else fetched whole.

        Args:
            plan: Names it.
            state: Knows which adapter came last.

        Raises:
            ArtifactError: bad bytes, or not an adapter this plan can train.
            TransportError, WireError: see :func:`fetch_blob`.
        """
        path = self._home.adapter_path(plan.adapter)
        make_folder(path.parent)
        initial = self._home.bundle_path(plan.bundle) / "adapter.safetensors"
        for here in (path, initial):  # a task may start from the bundle's own adapter
            if here.exists() and await asyncio.to_thread(file_digest, here) == plan.adapter:
                if here is initial:
                    shutil.copyfile(initial, path)
                break
        else:
            base = await asyncio.to_thread(self._base, plan, state) or Base(initial, OWN)
            if await self._patcher.make(plan, base, bundle=initial.parent, out=path):
                return path  # checked where it was made
            await fetch_blob(self._client, plan.adapter, path, max_bytes=plan.adapter_bytes)
        await demand(self._inspector, Request("adapter", str(initial.parent), plan.bundle, str(path), plan.ranks))
        return path

    def _base(self, plan: Plan, state: DeviceState) -> Base | None:
        """The adapter that came last, if it is of an earlier round and still what it was."""
        path = self._home.adapter_path(state.adapter)
        here = OWN < state.adapter_round < plan.round and path.exists() and file_digest(path) == state.adapter
        return Base(path, state.adapter_round) if here else None

    async def _fetch_bundle(self, digest: str, folder: Path) -> None:
        staging = make_folder(folder.with_name(folder.name + ".partial"))
        manifest = staging / MANIFEST_NAME
        if not (manifest.exists() and file_digest(manifest) == digest):
            await fetch_blob(self._client, digest, manifest, max_bytes=MAX_MANIFEST_BYTES)
        files = (await demand(self._inspector, Request("manifest", str(staging), digest))).files
        total = sum(file.bytes for file in files)
        if min((file.bytes for file in files), default=0) < 0 or total > self._floors.max_bundle_bytes:
            raise FloorError(
                f"bundle {digest[:12]}: size: expected at most {self._floors.max_bundle_bytes} bytes, got {total}"
            )
        for file in files:
            path = staging / file.name
            if file.name == MANIFEST_NAME or not path.resolve().is_relative_to(staging.resolve()):
                raise ArtifactFormatError(f"bundle {digest[:12]}: no place for a file named {file.name!r}")
            make_folder(path.parent)
            if not path.exists():  # one that has its name was verified, and the whole is checked again below
                await fetch_blob(self._client, file.sha256, path, max_bytes=file.bytes)
        reply = await self._inspector.ask(Request("bundle", str(staging), digest))
        if reply.error:
            shutil.rmtree(staging)
            raise ArtifactFormatError(reply.error)
        staging.replace(folder)
        sync_folder(folder.parent)
