"""The commands of the product as processes that may die at a point, and devices that write down what they see.

A server is ``python -m edge_runtime.cli cloud serve``, as anybody starts it; with a point it is ``python -m
tests.crash.process POINT NTH FOLDER cloud serve …``. A device is ``emberlora edge run`` forked from a process that has
imported it (:func:`run_edge`), with :mod:`tests.crash.child` in place of the training child and shorter waits. Its
connection, journal, state, files, child processes and signals are the real ones.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from edge_runtime.cli import main
from edge_runtime.device import client, loop, trainer
from tests.crash.points import POINTS, Point
from tests.crash.record import note

BACKOFF_S, BACKOFF_CAP_S = 0.1, 0.5
PART_BYTES = 100  # an update has a few hundred


class Fuse:
    """Kills this very process when something has happened so many times."""

    def __init__(self, left: int) -> None:
        self._left = left

    def burn(self) -> None:
        """It happened."""
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()


def arm(point: Point, nth: int) -> None:
    """Let this process die when it comes to a point for the ``nth`` time."""
    module, _, path = point.where.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for one in classes:
        owner = getattr(owner, one)
    setattr(owner, name, _wrapped(getattr(owner, name), Fuse(nth), first=point.when == "before"))


def _wrapped(function: Callable[..., Any], fuse: Fuse, *, first: bool) -> Callable[..., Any]:
    """``function``, with ``fuse`` before or after it."""
    before, after = (fuse.burn, _nothing) if first else (_nothing, fuse.burn)

    async def pieces(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        before()
        async for piece in function(*args, **kwargs):
            yield piece
        after()

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        before()
        result = await function(*args, **kwargs)
        after()
        return result

    def called(*args: Any, **kwargs: Any) -> Any:
        before()
        result = function(*args, **kwargs)
        after()
        return result

    if inspect.isasyncgenfunction(function):
        return pieces
    return functools.wraps(function)(awaited if inspect.iscoroutinefunction(function) else called)


def _nothing() -> None:
    """Not here."""


def run_edge(
    number: int, arguments: list[str], folder: Path, *, point: Point | None, nth: int, silence_s: float | None
) -> None:
    """Be device ``number`` with the output in its log; in a process that was forked for it."""
    name = Path(arguments[arguments.index("--home") + 1]).name
    log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    command = (sys.executable, "-m", "tests.crash.child", str(number), str(folder))
    trainer.ChildTrainer = functools.partial(trainer.ChildTrainer, command)  # type: ignore[misc]
    options: dict[str, Any] = {"backoff_s": BACKOFF_S, "backoff_cap_s": BACKOFF_CAP_S}
    if number:
        client.PART_BYTES = PART_BYTES  # device 0 sends its updates whole, the others in parts
    _write_down(folder, name)
    if silence_s is not None:
        options["wait_s"] = 1
        client._READ_S = silence_s
        client.Client._answer.__wrapped__.__kwdefaults__["read_s"] = silence_s  # type: ignore[attr-defined]
    loop.RunOptions = functools.partial(loop.RunOptions, **options)  # type: ignore[misc]
    if point is not None:
        arm(point, nth)
    main(["edge", "run", *arguments])


def _write_down(folder: Path, name: str) -> None:
    """Note which sealed bytes hold which frame, what is sent, and what is acknowledged, before anything follows."""
    seal, upload = loop.seal, client.Client.upload

    def sealing(data: bytes, **kwargs: Any) -> bytes:
        sealed = seal(data, **kwargs)
        note(folder, "sealed", name, frame=hashlib.sha256(data).hexdigest(), digest=hashlib.sha256(sealed).hexdigest())
        return sealed

    async def uploading(self: client.Client, pending: Any, sealed: bytes) -> Any:
        note(folder, "sent", name, round=pending.round, digest=pending.digest)
        receipt = await upload(self, pending, sealed)
        fields = {"round": receipt.round, "digest": receipt.digest, "weight": receipt.weight}
        note(folder, "acknowledged", name, **fields)
        return receipt

    loop.seal = sealing  # type: ignore[assignment]
    client.Client.upload = uploading  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(next(point for point in POINTS if point.name == sys.argv[1]), int(sys.argv[2]))
    main(sys.argv[3:])
