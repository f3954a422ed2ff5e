"""The plan's adapter made from one that is here and a patch, so that only what has changed is downloaded.

A patch is a convenience: whatever is wrong with it, the adapter can still be fetched whole, and the plan's digest says
whether the result is right. So nothing about a patch is an error of the device; only a connection that fails is told,
because the whole file would hardly fare better.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_runtime.device.artifacts import Request
from edge_runtime.device.errors import ArtifactError, TransportError
from edge_runtime.device.inspector import Inspector, demand
from edge_runtime.device.transport import Transport
from edge_runtime.wire import Plan, WireError

_MOST_FAILURES = 3  # then the whole file, whose download goes on where it was cut
_MARGIN_BYTES = 64 << 10  # over the whole file: header, marks, and scales of tiny matrices


@dataclass(frozen=True)
class Base:
    """A verified adapter file and the round whose plan names it, OWN for the bundle's."""

    path: Path
    round: int


class Patcher:
    """Asks for patches and has them applied."""

    def __init__(self, client: Transport, inspector: Inspector) -> None:
        self._client = client
        self._inspector = inspector
        self._failures: dict[str, int] = {}  # of the connection, by digest of the adapter wanted

    async def make(self, plan: Plan, base: Base, *, bundle: Path, out: Path) -> bool:
        """Write the plan's adapter to ``out``, checked like a downloaded one.

        Returns:
            Whether it is there; if not, nothing has changed and the whole file must be fetched.

        Raises:
            TransportError: cut, or no answer.
        """
        if self._failures.get(plan.adapter, 0) >= _MOST_FAILURES:
            return False
        file = out.with_name(out.name + ".patch")
        try:
            await self._fetch(plan, base, file)
            request = Request(
                "patch",
                str(bundle),
                plan.bundle,
                str(base.path),
                plan.ranks,
                str(out),
                patch=str(file),
                since=base.round,
                round=plan.round,
                makes=plan.adapter,
            )
            await demand(self._inspector, request)
        except (WireError, ArtifactError):
            return False
        finally:
            file.unlink(missing_ok=True)
        return True

    async def _fetch(self, plan: Plan, base: Base, file: Path) -> None:
        received = 0
        try:
            async with self._client.patch(plan.task, plan.round, since=base.round) as pieces:
                with file.open("wb") as target:
                    async for piece in pieces:
                        target.write(piece)
                        received += len(piece)
                        if received > plan.adapter_bytes + _MARGIN_BYTES:
                            raise ArtifactError(f"patch to round {plan.round}: longer than the adapter itself")
        except TransportError as error:
            error.progress = received > 0
            self._failures[plan.adapter] = self._failures.get(plan.adapter, 0) + 1
            raise
