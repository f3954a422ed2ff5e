"""What a device keeps on its disk, encrypted under keys that follow from one storage key."""

from edge_runtime.at_rest.errors import (
    AlteredError,
    AtRestError,
    MisplacedError,
    NotEncryptedError,
    StorageKeyFormatError,
    TruncatedError,
    WrongStorageKeyError,
)
from edge_runtime.at_rest.keys import Entropy, Purpose, StorageKey
from edge_runtime.at_rest.vault import NO_ROUND, OVERHEAD_BYTES, Grant, Vault, is_encrypted

__all__ = [
    "NO_ROUND",
    "OVERHEAD_BYTES",
    "AlteredError",
    "AtRestError",
    "Entropy",
    "Grant",
    "MisplacedError",
    "NotEncryptedError",
    "Purpose",
    "StorageKey",
    "StorageKeyFormatError",
    "TruncatedError",
    "Vault",
    "WrongStorageKeyError",
    "is_encrypted",
]
