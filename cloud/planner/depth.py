"""Which blocks a share of a model's depth is: the last ones, because below them there is no backward pass. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

_ROUNDING = 1e-9  # a third of six blocks is two


def lowest_of(share: float, blocks: Sequence[int]) -> int:
    """The first of the last blocks that are this share of all: one at least, and a part of a block counts as one.

    Args:
        share: From 0 to 1.
        blocks: Numbers of the blocks that have modules, rising; at least one.
    """
    return blocks[len(blocks) - max(1, math.ceil(share * len(blocks) - _ROUNDING))]
