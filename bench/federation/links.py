"""How long a task takes over slow links, from the bytes and operations of its rounds; nothing is measured here.

A round waits for its devices, which work side by side: fetch, train, send. A link carries what its rate allows or what
TCP makes of its losses, whichever is less; the latter after Mathis, Semke, Mahdavi and Ott (ACM SIGCOMM CCR 27(3),
1997): MSS / RTT · √(3/2) / √loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bench.federation.lines import Line

_SEGMENT_BYTES = 1_460
_DEVICE_GFLOP_S = 20.0  # what a board with four small cores makes of float32 products
_ROUND_TRIPS = 6  # a round: connection and request for the plan, the patch, the update


@dataclass(frozen=True)
class Link:
    """A device's way to the aggregator, the same in both directions."""

    mbit_s: float
    round_trip_s: float = 0.2
    loss: float = 0.02

    @property
    def bytes_s(self) -> float:
        """What a long transfer gets through, in bytes a second."""
        rate = self.mbit_s * 1e6 / 8
        if self.loss == 0:
            return rate
        return min(rate, _SEGMENT_BYTES / self.round_trip_s * math.sqrt(1.5 / self.loss))


def seconds_to(line: Line, target: float, link: Link, *, cohort: int) -> float | None:
    """Seconds until the run's adapter is as good as the target, bundle and head not counted; None if it never is."""
    total = 0.0
    for made in line.curve:
        total += _ROUND_TRIPS * link.round_trip_s
        total += made.bytes_both / cohort / link.bytes_s
        total += made.gflop / cohort / _DEVICE_GFLOP_S
        if line.metric.reached(made.value, target):
            return total
    return None
