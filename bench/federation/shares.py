"""Examples divided among devices, and the files of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

Record = Mapping[str, str]  # as ``emberlora edge run`` reads them


class Sizes(msgspec.Struct, frozen=True):
    """How large a run is.

    Attributes:
        devices: How many there are.
        cohort: Those of a round.
        rounds: Training rounds.
        examples: Of all devices together; every device passes over its own once a round.
        glimpse: Held-out examples that are measured on the way; all of them at the end.
        every: Rounds between two measurements.
        spread: Sigma of the log-normal distribution by which devices keep only a part of what the split gives them, the
            luckiest all; 0: everybody keeps everything.
    """

    devices: int
    cohort: int
    rounds: int
    examples: int
    glimpse: int
    every: int
    spread: float = 0.0

    def measured(self, round_: int) -> bool:
        """Whether there is a measurement after this round, counted from 0; always after the last one."""
        return (round_ + 1) % self.every == 0 or round_ + 1 == self.rounds


@dataclass(frozen=True)
class Shares:
    """What each device holds, and what nobody trains on; ``glimpse`` of :class:`Sizes` takes the first of these."""

    devices: tuple[tuple[Record, ...], ...]
    held_out: tuple[Record, ...]


def write_records(path: Path, records: Sequence[Record]) -> Path:
    """Write records, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
