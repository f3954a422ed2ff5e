"""What can go wrong on the aggregator's own side; refusals told to devices are :mod:`edge_runtime.wire.errors`.

CloudError
├── ConfigError             a config file is wrong (operator: correct the file)
├── DataError               the data folder cannot be used (operator: look at the folder)
│   ├── DataFullError       its disk is full (operator: make room; the server goes on by itself then)
│   ├── DataLockedError     another server process uses it
│   ├── DataSchemaError     written by another version, or for another task or bundle
│   ├── DataMissingError    a file or row it must hold is not there
│   └── AuditEntryError     a text in the audit log is no entry of this version
└── ServerError             a command cannot do its work at the running server
    ├── ServerAbsentError   no server answers
    └── ServerRefusedError  the server answered no
"""


class CloudError(Exception):
    """Base of all; never raised itself."""


class ConfigError(CloudError):
    """A config file is wrong; the message names file and key."""


class DataError(CloudError):
    """The data folder cannot be used."""


class DataFullError(DataError):
    """The disk of the data folder is full; what was to be written was not kept."""


class DataLockedError(DataError):
    """Another server process uses the data folder."""


class DataSchemaError(DataError):
    """The data folder was written by another version, or for another task or bundle."""


class DataMissingError(DataError):
    """A file or row that the data folder must hold is not there, or has other bytes."""


class AuditEntryError(DataError):
    """A text in the audit log is no entry of this version; whoever reads the log names the entry."""


class ServerError(CloudError):
    """A command cannot do its work at the running server."""


class ServerAbsentError(ServerError):
    """No server answers."""


class ServerRefusedError(ServerError):
    """The server answered no."""
