"""A device's folder. One process at a time works on it; every file in it is written atomically.

What was learned or seen of the device's texts, and its private keys, is encrypted (*) under a storage key, which lies
elsewhere: see :mod:`edge_runtime.at_rest` and :mod:`edge_runtime.device.storage_key`.

identity.json               name, server, its CA, task, plan key, and (*) private keys
storage.json                where the storage key is, and which one it is
settings.json               data and evaluation files, when to train, what no plan can ask
capability.json             what the device measured of itself
state.json                  last round seen and done, bytes, newest and published adapter
plans/round-N.plan          the signed plan in force
bundles/<digest>/           the verified bundle
adapters/<digest>.safetensors
outbox/round-N.sealed       * an update that is not acknowledged yet
outbox/round-N.record       * what it is
outbox/round-N.residual     * what will be left unsent once it is
outbox/round-N.personal     * what the device will keep for itself once it is
outbox/round-N.importance   * what its examples will still have to teach once it is
residual.encrypted          * what the acknowledged updates left unsent, where plans quantise
personal.encrypted          * trained parameters that never leave this device, where plans leave it any
importance.encrypted        * what its examples still have to teach, where plans ask for a share of them
checkpoint.encrypted        * how far the training of the round is that is trained now
remembered.hidden           * what the blocks below all that is trained make of the data; a cache
work/                       * what the training child writes; emptied after every round
published/                  the final adapter as a peft folder, for any program of the user's: in the clear
lock
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec

from edge_runtime.at_rest import AtRestError, Purpose, StorageKey, Vault, WrongStorageKeyError
from edge_runtime.device.errors import (
    CorruptFileError,
    HomeLockedError,
    NotEnrolledError,
    NotPublishedError,
    StorageKeyError,
)
from edge_runtime.device.files import decode_record, make_folder, read_record, sync_folder, write_bytes, write_record
from edge_runtime.device.records import (
    DeviceState,
    Identity,
    KeyPlace,
    Measured,
    Membership,
    PrivateKeys,
    Published,
    Settings,
    StoredIdentity,
)
from edge_runtime.training.job import (
    CARRIED_NAMES,
    CHECKPOINT_NAME,
    IMPORTANCE_NAME,
    JOB_PURPOSES,
    PERSONAL_NAME,
    REMEMBERED_NAME,
    RESIDUAL_NAME,
)

IDENTITY_NAME = "identity.json"
STORAGE_NAME = "storage.json"
_PURPOSES: tuple[Purpose, ...] = ("identity", "record", "update", *JOB_PURPOSES)


class _Form(msgspec.Struct, frozen=True):
    """What tells the two kinds of identity.json apart."""

    private_key: str = ""


class Home:
    """Paths and records of one device; reading raises ``CorruptFileError`` for a damaged file.

    Args:
        folder: Where it is.
        key: What it is encrypted under; None: only what is in the clear can be read.
    """

    def __init__(self, folder: Path, key: StorageKey | None = None) -> None:
        self.folder = folder
        self._key = key

    @property
    def work(self) -> Path:
        """Scratch folder of the training child."""
        return self.folder / "work"

    @property
    def outbox(self) -> Path:
        """Unsent updates."""
        return self.folder / "outbox"

    @property
    def residual(self) -> Path:
        """What the acknowledged updates left unsent; there once one was quantised."""
        return self.folder / RESIDUAL_NAME

    @property
    def remembered(self) -> Path:
        """What frozen blocks make of the device's examples, from round to round; may be removed at any time."""
        return self.folder / REMEMBERED_NAME

    @property
    def checkpoint(self) -> Path:
        """Where a training that was interrupted goes on; there while a round is trained."""
        return self.folder / CHECKPOINT_NAME

    @property
    def personal(self) -> Path:
        """Trained parameters that never leave this device; there once a round that has such was acknowledged."""
        return self.folder / PERSONAL_NAME

    @property
    def importance(self) -> Path:
        """What the device's examples still have to teach; there once a round that asked for a share of them counted."""
        return self.folder / IMPORTANCE_NAME

    @property
    def published_folder(self) -> Path:
        """The final adapter as a peft folder."""
        return self.folder / "published"

    def bundle_path(self, digest: str) -> Path:
        """Where the bundle with this digest is, or will be."""
        return self.folder / "bundles" / digest

    def adapter_path(self, digest: str) -> Path:
        """Where the adapter with this digest is, or will be."""
        return self.folder / "adapters" / f"{digest}.safetensors"

    def plan_path(self, round_: int) -> Path:
        """Where the signed plan of a round is while it is in force."""
        return self.folder / "plans" / f"round-{round_}.plan"

    def identity(self) -> Identity:
        """Who this device is.

        Raises:
            NotEnrolledError: it was never enrolled, or has left.
            StorageKeyError: the storage key is another one, or was not given.
        """
        identity = self.stored_identity()
        if identity is None or not identity.enrolled:
            raise self._not_enrolled()
        return identity

    def membership(self) -> Membership:
        """Which device this is, without its keys.

        Raises:
            NotEnrolledError: it was never enrolled, or has left.
        """
        membership = self.stored_membership()
        if membership is None or not membership.enrolled:
            raise self._not_enrolled()
        return membership

    def stored_membership(self) -> Membership | None:
        """What identity.json says in the clear, even when the server has not accepted it yet."""
        return read_record(self.folder / IDENTITY_NAME, Membership)

    def stored_identity(self) -> Identity | None:
        """What identity.json holds, even when the server has not accepted it yet."""
        path = self.folder / IDENTITY_NAME
        stored = read_record(path, StoredIdentity)
        if stored is None:
            return None
        vault = self._vault(stored.device, stored.task)
        with opening():
            data = vault.open(stored.keys, "identity", what=str(path), bound=stored.bound())
        return stored.with_keys(decode_record(data, PrivateKeys, what=path))

    def identity_form(self) -> Literal["none", "clear", "encrypted"]:
        """How identity.json keeps the private keys: not at all, as older versions did, or encrypted."""
        found = read_record(self.folder / IDENTITY_NAME, _Form)
        return "none" if found is None else "clear" if found.private_key else "encrypted"

    def clear_identity(self) -> Identity | None:
        """The identity as older versions kept it; None where it is not in the clear."""
        return read_record(self.folder / IDENTITY_NAME, Identity) if self.identity_form() == "clear" else None

    def save_identity(self, identity: Identity) -> None:
        """Keep who this device is, its private keys encrypted."""
        make_folder(self.folder)
        stored = StoredIdentity.around(identity)
        keys = msgspec.json.encode(PrivateKeys(identity.private_key, identity.pending_key))
        sealed = self._vault(identity.device, identity.task).encrypt(keys, "identity", bound=stored.bound())
        write_record(self.folder / IDENTITY_NAME, msgspec.structs.replace(stored, keys=sealed))

    def vault(self) -> Vault:
        """What encrypts and opens this device's files.

        Raises:
            NotEnrolledError: whose files they are is not known.
            StorageKeyError: the storage key was not given.
        """
        membership = self.membership()
        return self._vault(membership.device, membership.task)

    def key_place(self) -> KeyPlace | None:
        """Where the storage key is; None in a home that has encrypted nothing yet."""
        return read_record(self.folder / STORAGE_NAME, KeyPlace)

    def save_key_place(self, place: KeyPlace) -> None:
        """Keep where the storage key is."""
        make_folder(self.folder)
        write_record(self.folder / STORAGE_NAME, place)

    def settings(self) -> Settings:
        """What the user told this device to use."""
        return read_record(self.folder / "settings.json", Settings) or Settings()

    def save_settings(self, settings: Settings) -> None:
        """Keep what the user told this device to use."""
        write_record(self.folder / "settings.json", settings)

    def measured(self) -> Measured | None:
        """What the device measured of itself; None when it never has."""
        return read_record(self.folder / "capability.json", Measured)

    def save_measured(self, measured: Measured) -> None:
        """Keep what the device measured of itself."""
        write_record(self.folder / "capability.json", measured)

    def state(self) -> DeviceState:
        """Where the device is; a new device has seen no round."""
        return read_record(self.folder / "state.json", DeviceState) or DeviceState()

    def save_state(self, state: DeviceState) -> None:
        """Keep where the device is."""
        write_record(self.folder / "state.json", state)

    def published(self) -> Published | None:
        """What the task's last adapter is, once it has arrived."""
        return read_record(self.published_folder / "published.json", Published)

    def save_plan(self, round_: int, data: bytes) -> Path:
        """Keep the plan in force and drop the others; returns its path."""
        path = self.plan_path(round_)
        make_folder(path.parent)
        write_bytes(path, data)
        for other in path.parent.iterdir():
            if other != path:
                other.unlink()
        return path

    def fresh_work(self) -> Path:
        """An empty scratch folder."""
        self.clear_work()
        return make_folder(self.work)

    def clear_work(self) -> None:
        """Remove the scratch folder, and with it an update that is not sealed."""
        shutil.rmtree(self.work, ignore_errors=True)

    def prune(self, *, bundle: str, adapter: str) -> None:
        """Drop bundles and adapters other than these; what is half downloaded of these stays."""
        for folder, keep in (("bundles", bundle), ("adapters", adapter)):
            for path in sorted(make_folder(self.folder / folder).iterdir()):
                if path.name.startswith(keep):
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove what makes this home one device: identity, position, what is unsent or personal. Downloads stay."""
        for name in (IDENTITY_NAME, "state.json", "capability.json", REMEMBERED_NAME, CHECKPOINT_NAME, *CARRIED_NAMES):
            (self.folder / name).unlink(missing_ok=True)
        for folder in (self.outbox, self.work, self.folder / "plans"):
            shutil.rmtree(folder, ignore_errors=True)
        sync_folder(self.folder)

    def _vault(self, device: str, task: str) -> Vault:
        if self._key is None:
            raise StorageKeyError(f"{self.folder}: its storage key was not given: a fault of the caller")
        return Vault.of(self._key, _PURPOSES, device=device, task=task)

    def _not_enrolled(self) -> NotEnrolledError:
        return NotEnrolledError(
            f"{self.folder}: this device is not enrolled: get a token from the operator and run 'emberlora edge enroll'"
        )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this home for one process; the system releases it however the process ends.

        Raises:
            HomeLockedError: another process has it.
        """
        with (make_folder(self.folder) / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise HomeLockedError(
                    f"{self.folder}: another 'emberlora edge' process works on this home: "
                    "stop it, or pass another --home"
                ) from error
            yield


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """Errors of encrypted files as this package's own.

    Raises:
        StorageKeyError: the file was encrypted under another storage key.
        CorruptFileError: it is not what it should be.
    """
    try:
        yield
    except WrongStorageKeyError as error:
        raise StorageKeyError(f"{error}; nothing was changed") from error
    except AtRestError as error:
        raise CorruptFileError(str(error)) from error


def default_home(environ: Mapping[str, str], platform: str) -> Path:
    """Where a device lives if nothing is said: the platform's folder for a user's data."""
    if platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "emberlora"
    base = environ.get("XDG_DATA_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "share") / "emberlora"


def published_adapter(folder: Path | None) -> tuple[Path, Path]:
    """The bundle folder and the peft folder of the adapter a device received when its task finished.

    Args:
        folder: The device's home; None for the platform's default. For commands, as that default reads the environment.

    Raises:
        NotPublishedError: there is none, or not yet.
        CorruptFileError: its record is damaged.
    """
    home = Home(folder or default_home(os.environ, sys.platform))
    published = home.published()
    if published is None:
        raise NotPublishedError(
            f"{home.folder}: no published adapter: it arrives when the task is finished, by 'emberlora edge run'"
        )
    return home.bundle_path(published.bundle), home.published_folder
