"""What can go wrong in a measurement.

BenchError
├── UnavailableError   a system, setting or base cannot be run here: the others go on
└── RequestError       bad usage: what was asked for does not exist
"""

from __future__ import annotations


class BenchError(Exception):
    """Root of this package's errors; the message is one line."""


class UnavailableError(BenchError):
    """A system, setting or base that this checkout or machine cannot run."""


class RequestError(BenchError):
    """What was asked for does not exist."""
