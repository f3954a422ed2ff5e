"""Stands for the frozen blocks of a model, and says what their memory may take on disk."""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.hidden_file import KEY_BYTES
from edge_runtime.engine.remembered import RememberedHidden, Start

WIDTH = 6


class Computer:
    """Stands for the frozen blocks: row i of ``states`` is what they make of example i, shape (n, s, WIDTH)."""

    def __init__(self, states: np.ndarray, wanted: np.ndarray) -> None:
        self.states, self.wanted = states, wanted
        self.asked: list[list[int]] = []
        self.starts: list[Start | None] = []

    def recall(self, memory: RememberedHidden, examples: list[int]) -> np.ndarray:
        index = np.array(examples)

        def compute(missing: np.ndarray, start: Start | None) -> np.ndarray:
            self.asked.append(index[missing].tolist())
            self.starts.append(start)
            return self.states[index[missing]]

        return memory.recall([key_of(example) for example in examples], self.wanted[index], compute)


def eight_examples() -> Computer:
    """Of 1 to 8 tokens in 8."""
    rng = np.random.default_rng(0)
    wanted = np.arange(8) < np.arange(1, 9)[:, None]
    return Computer(rng.normal(size=(8, 8, WIDTH)).astype(np.float32), wanted)


def key_of(example: int) -> bytes:
    return bytes([example]) * KEY_BYTES


def bytes_of(*tokens: int) -> int:
    """A file with examples of so many tokens."""
    return 92 + sum(52 + count * (2 * WIDTH + 4) for count in tokens)
