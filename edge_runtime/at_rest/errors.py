"""What can be wrong with an encrypted file, or with the key it was encrypted under.

AtRestError
├── StorageKeyFormatError   what was given as a storage key is none
├── WrongStorageKeyError    a file was encrypted under another storage key: find that one; the file is whole
├── NotEncryptedError       no file of this format
├── TruncatedError          it is shorter or longer than its header says
├── MisplacedError          a whole file in another's place: of another purpose, round, device or task
└── AlteredError            its authentication fails: a bit of it was changed
"""

from __future__ import annotations


class AtRestError(Exception):
    """Base of all; never raised itself."""


class StorageKeyFormatError(AtRestError):
    """What was given as a storage key is none."""


class WrongStorageKeyError(AtRestError):
    """A file was encrypted under another storage key."""


class NotEncryptedError(AtRestError):
    """No file of this format."""


class TruncatedError(AtRestError):
    """A file is shorter or longer than its header says."""


class MisplacedError(AtRestError):
    """A whole file in another's place."""


class AlteredError(AtRestError):
    """A file's authentication fails."""
