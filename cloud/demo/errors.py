"""What can stop the demo.

DemoError
├── DemoInputError       the user's choice of folder or options: exit code 2
├── CorpusError          this Python's library holds too little text
├── CommandFailedError   one of the commands the demo runs failed; its log is named
└── MissedError          the run ended, but a figure is not what it must be
"""


class DemoError(Exception):
    """The demo cannot go on."""


class DemoInputError(DemoError):
    """The folder or an option cannot be used."""


class CorpusError(DemoError):
    """This Python's standard library holds too little text."""


class CommandFailedError(DemoError):
    """A command ended with another status than 0, or too early."""


class MissedError(DemoError):
    """A figure of the report is outside the bounds the demo promises."""
