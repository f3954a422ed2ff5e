"""The journal of unsent updates.

Sealing is randomised, so a repeated upload must send the very bytes of the first one: they are durable before the
first of them leaves. ``round-N.json`` is written after ``round-N.sealed``; without it there is nothing to send.

An update may come with what its training carries over to later rounds: ``round-N.residual`` is what a quantised one
leaves out, ``round-N.personal`` what the device keeps for itself. These replace the home's once the update is
acknowledged, and not before: an update that does not count is lost whole, and what earlier ones left out is still owed.
They take their places before the state says that the round is done. After a crash in between the update is sent again,
the server answers with the first receipt, and what is left to move is moved: a file replaces another and is never added
to one.

What a crash leaves here without a record is of no use, and :meth:`Outbox.sweep` drops it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from edge_runtime.device.errors import CorruptFileError
from edge_runtime.device.files import file_digest, make_folder, read_record, sync_folder, write_bytes, write_record
from edge_runtime.device.records import Pending
from edge_runtime.training.job import CARRIED_NAMES


class Outbox:
    """At most a few updates, usually none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def first(self) -> Pending | None:
        """The oldest unsent update.

        Raises:
            CorruptFileError: its record is damaged.
        """
        rounds = sorted(self._rounds())
        return read_record(self._folder / f"round-{rounds[0]}.json", Pending) if rounds else None

    def add(self, pending: Pending, sealed: bytes, *, carried: Path | None = None) -> None:
        """Make an update durable; when this returns it survives any crash.

        Args:
            pending: Its record.
            sealed: Its bytes.
            carried: Folder with durable files of what it carries over, which are moved here; None: nothing.
        """
        make_folder(self._folder)
        for name in CARRIED_NAMES:
            self._carried(pending.round, name).unlink(missing_ok=True)  # of a training that a crash ended here
            if carried is not None and (carried / name).exists():
                (carried / name).chmod(0o600)
                (carried / name).replace(self._carried(pending.round, name))
        write_bytes(self._folder / f"round-{pending.round}.sealed", sealed)
        write_record(self._folder / f"round-{pending.round}.json", pending)

    def sealed(self, pending: Pending) -> Path:
        """The bytes to send, checked.

        Raises:
            CorruptFileError: they are gone or changed.
        """
        path = self._folder / f"round-{pending.round}.sealed"
        found = file_digest(path) if path.exists() else "no file"
        if found != pending.digest:
            raise CorruptFileError(f"{path}: damaged: expected SHA-256 {pending.digest}, got {found}")
        return path

    def keep_carried(self, round_: int, folder: Path) -> None:
        """Let what an acknowledged update carries over replace what ``folder`` has of it; doing so twice is fine."""
        for name in CARRIED_NAMES:
            file = self._carried(round_, name)
            if file.exists():
                file.replace(folder / name)
                sync_folder(folder)

    def remove(self, round_: int) -> None:
        """Forget an update; doing so twice is fine."""
        (self._folder / f"round-{round_}.json").unlink(missing_ok=True)
        (self._folder / f"round-{round_}.sealed").unlink(missing_ok=True)
        for name in CARRIED_NAMES:
            self._carried(round_, name).unlink(missing_ok=True)
        if self._folder.exists():
            sync_folder(self._folder)

    def sweep(self) -> None:
        """Drop what belongs to no update: a crash came while one was added or removed."""
        if not self._folder.exists():
            return
        kept = {f"round-{round_}" for round_ in self._rounds()}
        for path in self._folder.iterdir():
            if path.stem not in kept:  # of round-1.sealed.partial that is round-1.sealed
                path.unlink()
        sync_folder(self._folder)

    def _carried(self, round_: int, name: str) -> Path:
        return self._folder / f"round-{round_}.{Path(name).stem}"

    def _rounds(self) -> list[int]:
        if not self._folder.exists():
            return []
        names = (path.name.removeprefix("round-").removesuffix(".json") for path in self._folder.glob("round-*.json"))
        return [int(name) for name in names if name.isdecimal()]


def pending_for(task: str, round_: int, plan: str, *, sealed: bytes, weight: int) -> Pending:
    """The journal record of a sealed update; ``plan`` is the digest of the plan it answers."""
    digest = hashlib.sha256(sealed).hexdigest()
    return Pending(task=task, round=round_, plan=plan, digest=digest, bytes=len(sealed), weight=weight)
