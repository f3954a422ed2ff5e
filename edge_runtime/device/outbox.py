"""The journal of unsent updates.

Sealing is randomised, so a repeated upload must send the very bytes of the first one: they are durable before the
first of them leaves. ``round-N.record`` is written after ``round-N.sealed``; without it there is nothing to send.

Everything here is encrypted under the home's storage key. For the sealed bytes that is a second time, since the key
of their round is not the device's: whoever has that one, and a stolen journal, reads nothing.

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

import msgspec

from edge_runtime.at_rest import Vault
from edge_runtime.device.errors import CorruptFileError
from edge_runtime.device.files import decode_record, make_folder, sync_folder, write_bytes
from edge_runtime.device.home import opening
from edge_runtime.device.records import Pending
from edge_runtime.training.job import CARRIED_NAMES


class Outbox:
    """At most a few updates, usually none.

    Args:
        folder: Where they are.
        vault: What encrypts them.
    """

    def __init__(self, folder: Path, vault: Vault) -> None:
        self._folder = folder
        self._vault = vault

    def first(self) -> Pending | None:
        """The oldest unsent update.

        Raises:
            CorruptFileError: its record is damaged.
            StorageKeyError: it was encrypted under another storage key.
        """
        round_ = first_round(self._folder)
        if round_ is None:
            return None
        path = self._folder / f"round-{round_}.record"
        with opening():
            data = self._vault.read(path, "record", round_=round_)
        return decode_record(data, Pending, what=path)

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
        round_, record = pending.round, msgspec.json.encode(pending)
        write_bytes(self._folder / f"round-{round_}.sealed", self._vault.encrypt(sealed, "update", round_=round_))
        write_bytes(self._folder / f"round-{round_}.record", self._vault.encrypt(record, "record", round_=round_))

    def sealed(self, pending: Pending) -> bytes:
        """The bytes to send, checked.

        Raises:
            CorruptFileError: they are gone or changed.
            StorageKeyError: they were encrypted under another storage key.
        """
        path = self._folder / f"round-{pending.round}.sealed"
        try:
            with opening():
                data = self._vault.read(path, "update", round_=pending.round)
        except FileNotFoundError as error:
            raise CorruptFileError(f"{path}: damaged: no file") from error
        found = hashlib.sha256(data).hexdigest()
        if found != pending.digest:
            raise CorruptFileError(f"{path}: damaged: expected SHA-256 {pending.digest}, got {found}")
        return data

    def keep_carried(self, round_: int, folder: Path) -> None:
        """Let what an acknowledged update carries over replace what ``folder`` has of it; doing so twice is fine."""
        for name in CARRIED_NAMES:
            file = self._carried(round_, name)
            if file.exists():
                file.replace(folder / name)
                sync_folder(folder)

    def remove(self, round_: int) -> None:
        """Forget an update; doing so twice is fine."""
        (self._folder / f"round-{round_}.record").unlink(missing_ok=True)
        (self._folder / f"round-{round_}.sealed").unlink(missing_ok=True)
        for name in CARRIED_NAMES:
            self._carried(round_, name).unlink(missing_ok=True)
        if self._folder.exists():
            sync_folder(self._folder)

    def sweep(self) -> None:
        """Drop what belongs to no update: a crash came while one was added or removed."""
        if not self._folder.exists():
            return
        kept = {f"round-{round_}" for round_ in _rounds(self._folder)}
        for path in self._folder.iterdir():
            if path.stem not in kept:  # of round-1.sealed.partial that is round-1.sealed
                path.unlink()
        sync_folder(self._folder)

    def _carried(self, round_: int, name: str) -> Path:
        return self._folder / f"round-{round_}.{Path(name).stem}"


def first_round(folder: Path) -> int | None:
    """The round of the oldest unsent update in an outbox, which its name tells without any key; None: there is none."""
    return min(_rounds(folder), default=None)


def _rounds(folder: Path) -> list[int]:
    if not folder.exists():
        return []
    names = (path.name.removeprefix("round-").removesuffix(".record") for path in folder.glob("round-*.record"))
    return [int(name) for name in names if name.isdecimal()]


def pending_for(task: str, round_: int, plan: str, *, sealed: bytes, weight: int) -> Pending:
    """The journal record of a sealed update; ``plan`` is the digest of the plan it answers."""
    digest = hashlib.sha256(sealed).hexdigest()
    return Pending(task=task, round=round_, plan=plan, digest=digest, bytes=len(sealed), weight=weight)
