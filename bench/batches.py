"""The batch every contestant trains on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bench.shapes import MODELS
from bench.systems import Setup

LR = 1e-5  # small: the timing must not depend on where the weights wander


def token_ids(setup: Setup) -> npt.NDArray[np.int64]:
    """Token ids, shape (batch, tokens); the next token of every position but the last is trained."""
    vocabulary = MODELS[setup.shape].vocabulary
    return np.random.default_rng(0).integers(3, vocabulary, size=(setup.batch, setup.tokens))
