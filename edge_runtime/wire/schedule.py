"""How learning rates fall over a training: by rounds on the aggregator, by steps where a device trains alone."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine"]
END_SHARE = 0.1  # what is left of a rate at the end; not zero, so that the last round still learns


def rate_share(schedule: Schedule, progress: float) -> float:
    """Share of the full learning rate in force.

    Args:
        schedule: "constant", or "cosine" (arXiv 1608.03983, without restarts) from 1 down to ``END_SHARE``.
        progress: How much of the training is over, from 0 to 1.
    """
    if schedule == "constant":
        return 1.0
    return END_SHARE + (1 - END_SHARE) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
