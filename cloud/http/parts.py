"""An update in parts, for links that are cut before a whole one is through: ask how much is there, send what follows.

The last part makes it an update like any other: its digest is checked, it is opened, counted and answered with a
receipt. Until then nothing of it counts, and nothing of it is in memory but the part that is coming.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from cloud.errors import DataMissingError
from cloud.service import Aggregator
from edge_runtime import wire


@dataclass(frozen=True)
class Part:
    """What a request says of the part it brings.

    Attributes:
        device: Whose update it is.
        task: The update's.
        round: The update's.
        digest: SHA-256 of the whole update, hex.
        offset: Bytes of the update before this part.
        of: Bytes of the whole update.
        bytes: Of this part.
    """

    device: str
    task: str
    round: int
    digest: str
    offset: int
    of: int
    bytes: int


class PartsDesk:
    """Takes the parts of updates, of each device one at a time."""

    def __init__(self, aggregator: Aggregator) -> None:
        self._aggregator = aggregator
        self._busy: set[str] = set()

    async def progress(self, device: str, *, task: str, round_: int, digest: str) -> wire.UpdateProgress:
        """How much of an update is there.

        Raises:
            NotFoundError, RoundError: it could not count; see :meth:`cloud.service.Aggregator.admit`.
        """
        answer = await self._aggregator.admit(device, task=task, round_=round_, digest=digest)
        if isinstance(answer, wire.UpdateReceipt):
            return wire.UpdateProgress(digest, 0, answer)
        return wire.UpdateProgress(digest, self._aggregator.parts.received(round_, device, digest))

    async def take(self, part: Part, read: Callable[[], Awaitable[bytes]]) -> tuple[wire.UpdateProgress, bool]:
        """Add a part to what is there, and count the update if it was the last one.

        Args:
            part: What it claims to be.
            read: Reads its bytes; not asked where the part is refused for what it claims.

        Returns:
            What is there now, and whether an update was counted just now.

        Raises:
            NotFoundError, RoundError: the update could not count.
            UpdateFormatError: the whole update would not have a length of the plan's, or end before this part does.
            UpdateOffsetError: this part begins elsewhere than what is there ends.
            UnavailableError: another part of this device is on its way.
            UpdateDigestError: the whole is not what its digest says; nothing of it is there any more.
            UpdateError, DataError: see :meth:`cloud.service.Aggregator.submit`.
        """
        answer = await self._aggregator.admit(part.device, task=part.task, round_=part.round, digest=part.digest)
        if isinstance(answer, wire.UpdateReceipt):
            return wire.UpdateProgress(part.digest, 0, answer), False
        _check(part, answer)
        with self._alone(part.device):
            return await self._append(part, read)

    async def _append(self, part: Part, read: Callable[[], Awaitable[bytes]]) -> tuple[wire.UpdateProgress, bool]:
        parts, where = self._aggregator.parts, (part.round, part.device, part.digest)
        there = parts.received(*where)
        if there != part.offset:
            raise wire.UpdateOffsetError(
                f"update of {part.device} for round {part.round}: {there} bytes of it are here: expected a part from "
                f"there on, got one from {part.offset}"
            )
        data = await read()
        try:
            await asyncio.to_thread(parts.append, *where, data, offset=part.offset)
            if there + len(data) < part.of:
                await self._demand_wanted(part)
                return wire.UpdateProgress(part.digest, there + len(data)), False
            sealed = await asyncio.to_thread(parts.whole, *where)
        except DataMissingError as error:  # dropped while this part came
            await self._demand_wanted(part)
            raise wire.UpdateOffsetError(
                f"update of {part.device} for round {part.round}: 0 bytes of it are here: expected a part from there on"
            ) from error
        return await self._count(part, sealed)

    async def _demand_wanted(self, part: Part) -> None:
        """Demand that the update could still count: its round may have ended while this part came.

        Raises:
            NotFoundError, RoundError: it could not, and nothing of it is there any more.
        """
        try:
            await self._aggregator.admit(part.device, task=part.task, round_=part.round, digest=part.digest)
        except (wire.NotFoundError, wire.RoundError):
            self._aggregator.parts.drop(part.round, part.device)
            raise

    async def _count(self, part: Part, sealed: bytes) -> tuple[wire.UpdateProgress, bool]:
        """Count an update that is there to its last byte; where the disk does not take it its parts stay."""
        parts = self._aggregator.parts
        try:
            found = hashlib.sha256(sealed).hexdigest()
            if found != part.digest:
                raise wire.UpdateDigestError(f"update: expected digest {part.digest[:12]}, got {found[:12]} in parts")
            receipt, new = await self._aggregator.submit(
                part.device, round_=part.round, digest=part.digest, sealed=sealed
            )
        except (wire.UpdateError, wire.RoundError):
            parts.drop(part.round, part.device)
            raise
        parts.drop(part.round, part.device)
        return wire.UpdateProgress(part.digest, 0, receipt), new

    @contextlib.contextmanager
    def _alone(self, device: str) -> Iterator[None]:
        if device in self._busy:
            raise wire.UnavailableError(f"update of {device}: another part of it is on its way")
        self._busy.add(device)
        try:
            yield
        finally:
            self._busy.discard(device)


def _check(part: Part, lengths: tuple[int, ...]) -> None:
    """Refuse a part of an update that could not be one of the plan's."""
    # Without bytes a part can only be asked to be the last: the server may have been killed before it counted.
    fits = part.offset + part.bytes <= part.of and (part.bytes or part.offset == part.of)
    if part.of not in lengths or not fits:
        expected = " or ".join(map(str, lengths))
        raise wire.UpdateFormatError(
            f"update of {part.device} for round {part.round}: expected parts of {expected} bytes in all, got "
            f"{part.bytes} from {part.offset} on of {part.of}"
        )
