"""Group commit: whatever arrives while a commit runs waits for it, and is then committed together by the next one.

A commit costs a wait for the disk whether it holds one row or fifty. Nobody waits for company: what arrives while none
runs is committed at once and alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class GroupCommit(Generic[T, R]):
    """Commits items in the order in which they came; all of them on one event loop."""

    def __init__(self, commit: Callable[[Sequence[T]], Awaitable[Sequence[R | Exception]]]) -> None:
        """``commit`` answers each of its items, one at least, with a result or with why it alone was refused. What it
        raises holds for all of them."""
        self._commit = commit
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._running: asyncio.Task[None] | None = None

    async def add(self, item: T) -> R:
        """Commit an item.

        Raises:
            Exception: why it was refused, or why the commit that it was part of failed.
        """
        done: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, done))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await done

    async def _run(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                _settle([done for _, done in group], await self._outcome([item for item, _ in group]))
        finally:
            self._running = None

    async def _outcome(self, items: Sequence[T]) -> Sequence[R | Exception]:
        try:
            return await self._commit(items)
        except Exception as error:  # noqa: BLE001 - whoever waits for the commit must hear of it, whatever it is
            return [error] * len(items)


def _settle(waiting: Sequence[asyncio.Future[R]], outcomes: Sequence[R | Exception]) -> None:
    for done, outcome in zip(waiting, outcomes, strict=True):
        if done.done():  # its request was cancelled; what was committed stays so
            continue
        if isinstance(outcome, Exception):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)
