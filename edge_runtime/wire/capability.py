"""What a device says about itself: enough to ask no more of it than it can do, and nothing that tells it from its like.

``docs/wire.md`` has the rules. Figures are a device's own word: they may choose how much it is asked to do, never what
its update counts for.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=604_800)]  # a step of a week is a mistake
_BytesPerSecond = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
_Mebibytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 30)]


class Capability(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A device's own measurements: PUT /v1/tasks/{task}/devices/{device}/capability. UNSET: not measured (yet).

    Attributes:
        machine: Architecture as ``uname -m`` has it, such as "aarch64".
        cores: Processor cores the device's process may use.
        memory_mb: All memory, MiB.
        available_mb: Memory that was free while nothing was trained, MiB.
        calibration_s: Seconds of the calibration pass, a fixed piece of work that needs no bundle; see
            :mod:`edge_runtime.engine.trial`. For comparing devices with one another, not with ``step_s``.
        step_s: Median seconds of an optimizer step of its last training round.
        up_bytes_s: Bytes a second of sent updates, over the whole time of their requests.
        down_bytes_s: The same of received files and patches.
        round_trip_s: Seconds until a request is answered, its connection included; the shortest seen.
    """

    machine: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_.-]{1,32}\Z")]
    cores: Annotated[int, msgspec.Meta(ge=1, le=65_536)]
    memory_mb: _Mebibytes
    available_mb: _Mebibytes
    calibration_s: _Seconds | UnsetType = UNSET
    step_s: _Seconds | UnsetType = UNSET
    up_bytes_s: _BytesPerSecond | UnsetType = UNSET
    down_bytes_s: _BytesPerSecond | UnsetType = UNSET
    round_trip_s: _Seconds | UnsetType = UNSET

    def __post_init__(self) -> None:
        """Refuse what contradicts itself; when a message is decoded, msgspec makes it one of its own errors."""
        if self.available_mb > self.memory_mb:
            raise ValueError(f"available_mb ({self.available_mb}) must not exceed memory_mb ({self.memory_mb})")
