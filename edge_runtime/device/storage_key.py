"""Where a home's storage key is: a file, an entry of the system's key store, or a credential of systemd.

The home says in storage.json which of them it is and which key, so that a key that is missing is told from a home that
never had one. What the user says goes first, then a credential that systemd hands over, then what the home says; a new
key in a file is made only for a home that holds nothing that another one encrypted. No place stands in for another: a
key that cannot be had ends the command with one line, and nothing is changed.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from edge_runtime.at_rest import Entropy, StorageKey, StorageKeyFormatError
from edge_runtime.at_rest.keys import KEY_BYTES
from edge_runtime.device.errors import StorageKeyError
from edge_runtime.device.files import make_folder, sync_folder
from edge_runtime.device.home import Home
from edge_runtime.device.records import KeyPlace

CREDENTIAL = "emberlora.storage-key"  # as LoadCredential names it
_KEYRING_SERVICE = "emberlora"
_SUFFIX = ".storage-key"
_MAX_BYTES = 1 << 10  # of a key file; 64 digits and white space


class KeyStore(Protocol):
    """The system's key store. Failures are ``StorageKeyError`` in words for the user."""

    def get(self, name: str) -> str | None:
        """An entry; None when there is none."""

    def set(self, name: str, text: str) -> None:
        """Make an entry."""


class SystemKeyStore:
    """The ``keyring`` package, an extra: Keychain, Secret Service, KWallet."""

    def get(self, name: str) -> str | None:
        """See :class:`KeyStore`."""
        with _keyring_errors():
            import keyring

            found: str | None = keyring.get_password(_KEYRING_SERVICE, name)
            return found

    def set(self, name: str, text: str) -> None:
        """See :class:`KeyStore`."""
        with _keyring_errors():
            import keyring

            keyring.set_password(_KEYRING_SERVICE, name, text)


@contextlib.contextmanager
def _keyring_errors() -> Iterator[None]:
    try:
        from keyring.errors import KeyringError
    except ModuleNotFoundError as error:
        raise StorageKeyError(
            "the system's key store: needs the package 'keyring', which is not installed: "
            "pip install 'emberlora[keyring]'"
        ) from error
    try:
        yield
    except KeyringError as error:
        # gnome-keyring's sentences end with two full stops ("Prompt dismissed.."), some backends say nothing.
        said = str(error).rstrip(".!") or type(error).__name__
        raise StorageKeyError(
            f"the system's key store: cannot be used: {said}: unlock it, or keep the storage key in a file: "
            "--storage-key-file"
        ) from error


@dataclass(frozen=True)
class KeyChoice:
    """What a command line says of the storage key.

    Attributes:
        file: The file it is in, or is to be in.
        keyring: Whether it is, or is to be, in the system's key store.
        credentials: Folder of the credentials that systemd hands over; it may have none for us.
    """

    file: Path | None = None
    keyring: bool = False
    credentials: Path | None = None


def find_key(
    home: Home, choice: KeyChoice, *, store: KeyStore | None = None, entropy: Entropy = os.urandom
) -> StorageKey:
    """The key of a home, made where there is none yet and none is missed; its place is kept in the home.

    Args:
        home: The caller holds its lock.
        choice: What the user says.
        store: The system's key store.
        entropy: For a new key.

    Raises:
        StorageKeyError: it is missing, is none, is another one, or others may read it.
        CorruptFileError: the home's own record is damaged.
    """
    store = SystemKeyStore() if store is None else store
    known, form = home.key_place(), home.identity_form()
    place = _place(home, choice, known)
    text = _load(place, choice, store)
    if text is None:
        # A home in the clear that names a key was being encrypted under it when a crash came.
        bare = form == "none" or (form == "clear" and known is None)
        if place.kind == "credential" or not bare:
            raise _missing(home, place, known)
        text = StorageKey(entropy(KEY_BYTES)).text()
        _make(place, text, store)
    try:
        key = StorageKey.parse(text)
    except StorageKeyFormatError as error:
        raise StorageKeyError(f"{place}: no storage key: {error}") from error
    if known is not None and form != "none" and key.id != known.key_id:
        raise StorageKeyError(
            f"{place}: another storage key than the one {home.folder} is encrypted under: expected key "
            f"{known.key_id}, got {key.id}: give the one that was at {known}; nothing was changed"
        )
    found = msgspec.structs.replace(place, key_id=key.id)
    if found != known:
        home.save_key_place(found)
    return key


def default_file(folder: Path) -> Path:
    """Where the key of a home is if nothing is said: beside it, so that whoever copies the home has no key.

    Where nothing can be kept beside it, inside: it is a volume of its own, as containers have, which outlives what is
    around it, or the folder around it is not ours to write to.
    """
    beside = folder.with_name(folder.name + _SUFFIX)
    alone = os.path.ismount(folder) or (folder.exists() and not os.access(folder.parent, os.W_OK))
    return folder / _SUFFIX.removeprefix(".") if alone and not beside.exists() else beside


def _place(home: Home, choice: KeyChoice, known: KeyPlace | None) -> KeyPlace:
    if choice.file is not None:
        return KeyPlace("file", str(choice.file.resolve()))
    if choice.keyring:
        return known if known is not None and known.kind == "keyring" else KeyPlace("keyring", str(home.folder))
    if choice.credentials is not None and (choice.credentials / CREDENTIAL).exists():
        return KeyPlace("credential", CREDENTIAL)
    return known or KeyPlace("file", str(default_file(home.folder)))


def _load(place: KeyPlace, choice: KeyChoice, store: KeyStore) -> str | None:
    if place.kind == "keyring":
        return store.get(place.where)
    if place.kind == "credential":  # systemd sees to who may read it, by an access list that its mode does not show
        return None if choice.credentials is None else _read(choice.credentials / CREDENTIAL, private=False)
    return _read(Path(place.where), private=True)


def _read(path: Path, *, private: bool) -> str | None:
    """A key file's text, None where there is none; a ``private`` one must be readable by its owner only."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if private and stat.S_IMODE(status.st_mode) & 0o077:
                raise StorageKeyError(
                    f"{path}: others may read this storage key (mode {stat.S_IMODE(status.st_mode):04o}): chmod 600 "
                    "it; on a medium without modes, mount it with umask=077"
                )
            return file.read(_MAX_BYTES).decode("ascii", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageKeyError(f"{path}: the storage key cannot be read: {error.strerror}") from error


def _make(place: KeyPlace, text: str, store: KeyStore) -> None:
    if place.kind == "keyring":
        store.set(place.where, text)
        if store.get(place.where) != text:  # a store that forgets would take all that is encrypted with it
            raise StorageKeyError(f"{place}: the key store did not keep the storage key: use --storage-key-file")
        return
    path = Path(place.where)
    try:
        make_folder(path.parent)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # never over another home's key
        with contextlib.ExitStack() as unless_whole:
            unless_whole.callback(path.unlink)  # a full disk must not leave what is no key and yet in its place
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            unless_whole.pop_all()
        sync_folder(path.parent)
    except OSError as error:
        raise StorageKeyError(f"{path}: a storage key cannot be made here: {error.strerror}") from error


def _missing(home: Home, place: KeyPlace, known: KeyPlace | None) -> StorageKeyError:
    hint = {
        "file": "put it back or mount it, or say where it is with --storage-key-file",
        "keyring": "put it back, or give a copy with --storage-key-file",
        "credential": f"let the service load it, LoadCredentialEncrypted={CREDENTIAL}",
    }[place.kind]
    moved = f" (until now at {known})" if known is not None and (known.kind, known.where) != _where(place) else ""
    which = f" {known.key_id}" if known is not None else ""
    return StorageKeyError(
        f"{place}: no storage key there{moved}: {home.folder} is encrypted under key{which}: {hint}; without it this "
        "device enrols anew with another --home; nothing was changed"
    )


def _where(place: KeyPlace) -> tuple[str, str]:
    return place.kind, place.where
