"""Asking for a bundle or an adapter to be checked, without loading what checks it.

The work is in :mod:`edge_runtime.device.artifacts`, which runs as a child process; see there for why.
"""

from __future__ import annotations

import sys
from typing import Protocol

import msgspec

from edge_runtime.device.artifacts import Reply, Request
from edge_runtime.device.child import run_child
from edge_runtime.device.errors import ArtifactError, ArtifactFormatError, StorageKeyError


class Inspector(Protocol):
    """Answers requests about artifacts."""

    async def ask(self, request: Request) -> Reply:
        """The reply; its ``error`` is set when the artifact is bad.

        Raises:
            ArtifactError: the check itself ended without an answer.
        """


class ChildInspector:
    """A process for each request."""

    async def ask(self, request: Request) -> Reply:
        """See :class:`Inspector`."""
        ended = await run_child((sys.executable, "-m", "edge_runtime.device.artifacts"), msgspec.json.encode(request))
        try:
            return msgspec.json.decode(ended.output, type=Reply)
        except msgspec.DecodeError as error:
            raise ArtifactError(f"checking the {request.action} failed: {ended.describe()}") from error


async def demand(inspector: Inspector, request: Request) -> Reply:
    """Ask, and raise what is wrong.

    Raises:
        ArtifactFormatError: the artifact is bad.
        ArtifactError: it could not be checked.
        StorageKeyError: a file of this home was encrypted under another storage key.
    """
    reply = await inspector.ask(request)
    if reply.home_error:
        raise StorageKeyError(f"{reply.home_error}; nothing was changed")
    if reply.error:
        raise ArtifactFormatError(reply.error)
    return reply
