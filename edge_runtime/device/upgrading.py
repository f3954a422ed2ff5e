"""A home of an older version, which kept everything in the clear, encrypted in place.

Every file is replaced in one step, and identity.json is the last: as long as that is in the clear, the home is not done
and this goes on where a crash ended it. A file is never there in neither form. What the disk still holds of the old
bytes where no file is any more cannot be reached from here; hence the advice to replace the signing key.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_runtime.at_rest import NO_ROUND, Purpose, StorageKey, Vault, is_encrypted
from edge_runtime.device.events import DeviceEvent, Encrypted
from edge_runtime.device.files import sync_folder, write_bytes
from edge_runtime.device.home import Home
from edge_runtime.training.job import PERSONAL_NAME, RESIDUAL_NAME

# Name of an older version -> name now, purpose.
_CARRIED: dict[str, tuple[str, Purpose]] = {
    "residual.safetensors": (RESIDUAL_NAME, "residual"),
    "personal.safetensors": (PERSONAL_NAME, "personal"),
}
# In the outbox, by the end of the name. The record last: without it the others are nothing.
_UNSENT: dict[str, tuple[str, Purpose]] = {
    ".sealed": (".sealed", "update"),
    ".residual": (".residual", "residual"),
    ".personal": (".personal", "personal"),
    ".json": (".record", "record"),
}


def upgrade(home: Home, key: StorageKey, report: Callable[[DeviceEvent], None]) -> None:
    """Encrypt a home of an older version; one that is encrypted is left as it is.

    Args:
        home: With ``key``; the caller holds its lock.
        key: Its storage key.
        report: Is told when the home has been encrypted.

    Raises:
        CorruptFileError: identity.json is damaged.
        OSError: the disk's own; calling again goes on.
    """
    identity = home.clear_identity()
    if identity is None:
        return
    files = 1
    if identity.enrolled:
        vault = Vault.of(key, ("update", "record", "residual", "personal"), device=identity.device, task=identity.task)
        files += _carried(home.folder, vault) + _unsent(home.outbox, vault)
    home.clear_work()
    home.remembered.unlink(missing_ok=True)  # a cache, and of the old format
    home.save_identity(identity)
    report(Encrypted(files=files, key=str(home.key_place())))


def _carried(folder: Path, vault: Vault) -> int:
    return sum(
        _encrypt(folder / old, folder / new, vault, purpose, NO_ROUND) for old, (new, purpose) in _CARRIED.items()
    )


def _unsent(outbox: Path, vault: Vault) -> int:
    count = 0
    for end, (new_end, purpose) in _UNSENT.items():
        for path in sorted(outbox.glob(f"round-*{end}")):
            number = path.stem.removeprefix("round-")
            if number.isdecimal():  # another belongs to no update, and the outbox sweeps it
                count += _encrypt(path, path.with_suffix(new_end), vault, purpose, int(number))
    return count


def _encrypt(old: Path, new: Path, vault: Vault, purpose: Purpose, round_: int) -> bool:
    """Replace one file, or what is left of doing so; whether there was one."""
    try:
        data = old.read_bytes()
    except FileNotFoundError:
        return False
    if not is_encrypted(data):
        write_bytes(new, vault.encrypt(data, purpose, round_=round_))
    if new != old:
        old.unlink()
        sync_folder(old.parent)
    return True
