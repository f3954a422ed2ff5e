"""Opening a home for a command: its lock, its storage key, and what an older version left in the clear."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from edge_runtime.device.errors import InputError
from edge_runtime.device.events import DeviceEvent
from edge_runtime.device.home import Home
from edge_runtime.device.storage_key import KeyChoice, find_key
from edge_runtime.device.upgrading import upgrade

_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)


def storage_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say where the storage key is; the command gets them as one :class:`KeyChoice` ``keys``."""

    @functools.wraps(command)
    def with_keys(
        *, storage_key_file: Path | None, storage_keyring: bool, credentials: Path | None, **rest: object
    ) -> object:
        return command(keys=KeyChoice(storage_key_file, storage_keyring, credentials), **rest)

    made: Callable[..., Any] = with_keys
    for option in (
        click.option("--credentials", type=_FOLDER, envvar="CREDENTIALS_DIRECTORY", hidden=True),
        click.option(
            "--storage-keyring",
            is_flag=True,
            help="Keep the storage key in the system's key store; needs 'emberlora[keyring]'. Remembered.",
        ),
        click.option(
            "--storage-key-file",
            type=_FILE,
            envvar="EMBERLORA_STORAGE_KEY_FILE",
            show_envvar=True,
            help="File with the key that the home is encrypted under; made if there is none. Remembered.  "
            "[default: HOME.storage-key]",
        ),
    ):
        made = option(made)
    return made


@contextlib.contextmanager
def opened(
    folder: Path, keys: KeyChoice, report: Callable[[DeviceEvent], None], *, new: bool = False
) -> Iterator[Home]:
    """A home that this process alone works on, with its storage key; encrypted first if an older version made it.

    Args:
        folder: Where it is.
        keys: Where its storage key is.
        report: Is told when it has been encrypted.
        new: It may be one that is not enrolled, or not there yet; otherwise none is made.

    Raises:
        NotEnrolledError: it is none, and ``new`` is not set.
        HomeLockedError: another process has it.
        StorageKeyError: its storage key cannot be had.
        InputError: two places are given for it.
    """
    if keys.file is not None and keys.keyring:
        raise InputError("--storage-key-file and --storage-keyring: give one of them")
    bare = Home(folder)
    if not new:
        bare.membership()
    with bare.locked():
        key = find_key(bare, keys)
        home = Home(folder, key)
        upgrade(home, key, report)
        yield home
