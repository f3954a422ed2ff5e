"""What only our own engine tells of a step: where its time went and what it held. Light to import."""

from __future__ import annotations

import msgspec


class Inside(msgspec.Struct, frozen=True):
    """One step from inside.

    Attributes:
        runtime_ms: In ONNX Runtime's own code; without its Python wrapper, which checks and wraps every tensor and is
            no kernel.
        optimizer_ms: In the optimizer.
        kept_mb: MiB of tensors held between the forward and the backward pass.
    """

    runtime_ms: float
    optimizer_ms: float
    kept_mb: float
