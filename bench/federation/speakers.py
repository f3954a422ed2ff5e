"""Shakespeare's speakers: a device is one of them and holds speeches of that one, which are to be predicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from bench.errors import RequestError
from bench.federation.shares import Shares, Sizes

_FEWEST_CHARS = 40  # of a speech: anybody could have said a shorter one
_HELD_OUT = 10  # the last of so many speeches


class Speaker(msgspec.Struct, frozen=True):
    """A line of the file; ``lines`` are speeches in the order of the plays."""

    speaker: str
    lines: tuple[str, ...]

    @property
    def chars(self) -> int:
        """Of all speeches together."""
        return sum(map(len, self.lines))

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """(to train on, held out): the last tenth of all speeches is held out; of both, those that say something."""
        cut = len(self.lines) - -(-len(self.lines) // _HELD_OUT)
        before, after = (
            [speech for speech in side if len(speech) >= _FEWEST_CHARS] for side in (self.lines[:cut], self.lines[cut:])
        )
        return before, after


def read_speakers(data: Path) -> list[Speaker]:
    """All speakers from a folder as ``shared/data`` is, those with the most text first.

    Raises:
        RequestError: it is not there, or something else.
    """
    path = data / "lm_shakespeare" / "speakers.jsonl"
    try:
        found = [msgspec.json.decode(line, type=Speaker) for line in path.read_bytes().splitlines()]
    except (OSError, msgspec.DecodeError) as error:
        raise RequestError(f"{data}: not the data of shakespeare: {type(error).__name__} {error}") from error
    return sorted(found, key=lambda speaker: (-speaker.chars, speaker.speaker))


def share_speeches(data: Path, sizes: Sizes, alpha: float | None, seed: int) -> Shares:
    """A device for each of the speakers with the most text.

    Args:
        data: Folder of data sets.
        sizes: Every device holds equally many speeches, drawn from those of its speaker; the first that are held out
            of every speaker are measured, equally many of each as far as there are.
        alpha: None: there is no other division.
        seed: Of the draw, the same for all methods.

    Raises:
        RequestError: there are too few speakers, or one of them has too few speeches.
    """
    assert alpha is None, "the workload has no other split"
    speakers = read_speakers(data)[: sizes.devices]
    if len(speakers) < sizes.devices:
        raise RequestError(f"{data}: too few speakers: expected {sizes.devices}, got {len(speakers)}")
    rng = np.random.default_rng([seed, 1])
    each, measured = sizes.examples // sizes.devices, sizes.glimpse // sizes.devices
    held = [speaker.sides[1][:measured] for speaker in speakers]
    return Shares(
        tuple(_drawn(speaker, each, rng) for speaker in speakers),
        tuple({"text": speech} for speeches in held for speech in speeches),
    )


def _drawn(speaker: Speaker, count: int, rng: np.random.Generator) -> tuple[Mapping[str, str], ...]:
    speeches = speaker.sides[0]
    if len(speeches) < count:
        raise RequestError(
            f"{speaker.speaker}: too few speeches of {_FEWEST_CHARS} characters or more to train on: expected {count}, "
            f"got {len(speeches)}"
        )
    return tuple({"text": speeches[index]} for index in sorted(rng.permutation(len(speeches))[:count]))
