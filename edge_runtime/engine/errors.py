"""What can go wrong in the engine.

EngineError
├── EngineMissingError  this environment has not the ONNX Runtime that the bundle is for: install it
├── GraphError          a graph of the bundle is not what the manifest says: export the bundle again
├── EngineInputError    parameters, alive set or batch do not fit the bundle: the caller's mistake or a bad plan
└── DivergedError       the loss is no longer finite: lower the learning rate
"""


class EngineError(Exception):
    """Base of all; never raised itself."""


class EngineMissingError(EngineError):
    """This environment has not the ONNX Runtime that the bundle is for."""


class GraphError(EngineError):
    """A graph of the bundle is not what the manifest says."""


class EngineInputError(EngineError):
    """Parameters, alive set or batch do not fit the bundle."""


class DivergedError(EngineError):
    """The loss is no longer finite."""
