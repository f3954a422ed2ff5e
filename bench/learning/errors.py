"""What can go wrong in this measurement.

LearningError
├── LearningInputError   data, options or a file of results cannot be used: nothing was run
└── RunError             an export or a training failed: the message has what it said
"""

from __future__ import annotations


class LearningError(Exception):
    """Root of this package's errors; the message is one line."""


class LearningInputError(LearningError):
    """What was given cannot be used."""


class RunError(LearningError):
    """A process that was started failed."""
