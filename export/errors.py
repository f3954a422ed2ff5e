"""What can go wrong while a bundle is made, split by who must act.

ExportError
├── ExportInputError          the user: the command's input cannot be exported (exit code 2)
│   ├── ModelError            no such model, or one whose blocks, head or weights are not what this exporter knows
│   ├── TargetError           a LoRA target that is no linear layer of the blocks
│   ├── AdapterError          a peft folder that cannot become the bundle's initial adapter
│   ├── DataError             labels or records that cannot be read or contradict the model
│   ├── OutputError           the place for the bundle is taken or cannot be written
│   └── ExtraMissingError     the packages of the extra ``export`` are not installed
└── ExportFailedError         the exporter: the work itself failed (exit code 1)
    ├── TraceError            a graph could not be made, or breaks the bundle's contract
    └── VerificationError     a graph was made but its numbers are not those of autograd
"""


class ExportError(Exception):
    """No bundle was made."""


class ExportInputError(ExportError):
    """The input cannot be exported; another input may be."""


class ModelError(ExportInputError):
    """There is no such model, or the exporter does not know its kind."""


class TargetError(ExportInputError):
    """A LoRA target is no linear layer of the blocks."""


class AdapterError(ExportInputError):
    """A peft adapter folder cannot become the bundle's initial adapter."""


class DataError(ExportInputError):
    """Labels or records cannot be read, or contradict the model."""


class OutputError(ExportInputError):
    """The place for the bundle is taken or cannot be written."""


class ExtraMissingError(ExportInputError):
    """The packages of the extra ``export`` are not installed."""


class ExportFailedError(ExportError):
    """The work failed although the input looked right."""


class TraceError(ExportFailedError):
    """A graph could not be made, or breaks the bundle's contract."""


class VerificationError(ExportFailedError):
    """A graph's numbers are not those of torch autograd."""
