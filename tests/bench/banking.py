"""A tiny data set in the layout of BANKING77."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

LABELS = ("asyncio", "email", "tkinter", "xml")


def write_banking(folder: Path) -> Path:
    """Words of its own for every label, in the layout of BANKING77."""
    rng = np.random.default_rng(0)
    (folder / "text_banking77").mkdir(parents=True)
    for name, count in (("train", 200), ("test", 40)):
        with (folder / "text_banking77" / f"{name}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("text", "category"))
            for number in range(count):
                words = [f"word{number % 4 * 10 + int(word)}" for word in rng.integers(0, 10, size=8)]
                rows.writerow((" ".join(words), LABELS[number % 4]))
    return folder
