"""What can go wrong on a device besides what the wire names (``edge_runtime.wire.errors``), split by who must act.

DeviceError
├── LocalError              the user or the machine must act; the message is for the user
│   ├── InputError          settings or data of the user are the cause (exit code 2)
│   │   ├── NotEnrolledError    this home has no identity yet, or gave it up
│   │   ├── EnrolledError       this home already has an identity
│   │   ├── NotPublishedError   this home has received no final adapter yet
│   │   ├── StorageKeyError     the key of this home's files is not there, or another one is
│   │   └── TrainingInputError  a data file is missing or has bad lines
│   ├── HomeLockedError     another process runs on this home
│   ├── CorruptFileError    a file of the home cannot be read as what it should be
│   ├── UntrustedServerError  its certificate is not to be trusted, or it speaks no TLS: do not retry
│   ├── TrainingError       the training child failed for another reason than its input
│   └── EngineTrialError    ONNX Runtime does not compute on this machine
├── TransportError          the server cannot be reached or cannot answer now: retry
├── RefusedError            what the server sent must not be obeyed: do nothing, ask again
│   ├── PinMismatchError    the server's plan key is not the one the token names
│   └── FloorError          a plan asks for more than this device allows
├── HeldError               this device may not train now, by its user's rules: wait until it may
└── ArtifactError           a downloaded bundle or adapter is bad: fetch it again
    ├── ArtifactDigestError     its bytes are not the ones the plan names
    └── ArtifactFormatError     right bytes, but not a bundle or adapter this plan can train
"""

from __future__ import annotations


class DeviceError(Exception):
    """Base of all; never raised itself."""


class LocalError(DeviceError):
    """The user or the machine must act."""


class InputError(LocalError):
    """Settings or data of the user are the cause."""


class NotEnrolledError(InputError):
    """This home has no identity."""


class EnrolledError(InputError):
    """This home already has an identity."""


class NotPublishedError(InputError):
    """This home has received no final adapter yet."""


class StorageKeyError(InputError):
    """The key that this home is encrypted under is not there, is none, or is another one."""


class TrainingInputError(InputError):
    """A data file is missing or has bad lines."""


class HomeLockedError(LocalError):
    """Another process runs on this home."""


class CorruptFileError(LocalError):
    """A file of the home cannot be read as what it should be."""


class UntrustedServerError(LocalError):
    """The server's certificate is not to be trusted, or it does not speak TLS where it should."""


class TrainingError(LocalError):
    """The training child failed for another reason than its input."""


class EngineTrialError(LocalError):
    """ONNX Runtime does not compute on this machine."""


class TransportError(DeviceError):
    """The server cannot be reached or cannot answer now.

    Args:
        message: What happened, for the user.
        retry_after_s: When the server wants to be asked again, in seconds; None if it did not say.
        progress: Bytes of a download arrived before it was cut, so that waiting longer each time is not called for.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None, progress: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.progress = progress


class RefusedError(DeviceError):
    """What the server sent must not be obeyed."""


class PinMismatchError(RefusedError):
    """The server's plan key is not the one the token names."""


class FloorError(RefusedError):
    """A plan asks for more than this device allows."""


class HeldError(DeviceError):
    """A training was ended because its user's rules are no longer met."""


class ArtifactError(DeviceError):
    """A downloaded bundle or adapter is bad."""


class ArtifactDigestError(ArtifactError):
    """Its bytes are not the ones the plan names."""


class ArtifactFormatError(ArtifactError):
    """Right bytes, but not a bundle or adapter this plan can train."""
