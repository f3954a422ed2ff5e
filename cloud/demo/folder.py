"""The folder a run fills, and the texts in it.

demo.marker              says that the folder is a demo's and may be replaced
data/pooled.jsonl        all texts to train on; no device sees this file
data/heldout.jsonl       all held-out texts
data/device-N/*.jsonl    what device N has: train and heldout
bundle/ server/ devices/device-N/ logs/
adapter/ central/        peft folders: of the devices together, of the pooled run
report.json report.html
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cloud.demo.corpus import Example, Split, deal
from cloud.demo.errors import DemoInputError
from cloud.demo.recipe import Recipe

MARKER = "demo.marker"


class DemoFolder:
    """Paths of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self.bundle = root / "bundle"
        self.server = root / "server"
        self.logs = root / "logs"
        self.adapter = root / "adapter"
        self.central = root / "central"
        self.pooled = self.data / "pooled.jsonl"
        self.heldout = self.data / "heldout.jsonl"

    @classmethod
    def prepare(cls, root: Path) -> DemoFolder:
        """Make an empty folder, in place of an earlier run's.

        Raises:
            DemoInputError: something else is there; nothing was changed.
        """
        folder = cls(root)
        if root.exists() or root.is_symlink():
            if not root.is_dir() or root.is_symlink():
                raise DemoInputError(f"{root}: is not a folder: choose another --out")
            if any(root.iterdir()) and not (root / MARKER).is_file():
                raise DemoInputError(f"{root}: holds something else than an earlier demo: choose another --out")
            shutil.rmtree(root)
        for path in (folder.data, folder.logs):
            path.mkdir(parents=True)
        (root / MARKER).write_text("made by `emberlora demo`; replaced by the next one\n", encoding="utf-8")
        return folder

    def home(self, device: str) -> Path:
        """The folder ``device`` lives in."""
        return self.root / "devices" / device

    def texts(self, device: str, part: str) -> Path:
        """A device's texts; ``part`` is train or heldout."""
        return self.data / device / f"{part}.jsonl"

    def write_texts(self, split: Split, recipe: Recipe, rng: np.random.Generator) -> dict[str, dict[str, int]]:
        """Write pooled, held-out and the devices' files; return how many training texts each device has by package.

        Every text goes to one device only, held-out texts as well.
        """
        _write(self.pooled, split.train, recipe)
        _write(self.heldout, split.heldout, recipe)
        held = {
            part: deal(examples, devices=recipe.devices, home_share=recipe.home_share, rng=rng)
            for part, examples in (("train", split.train), ("heldout", split.heldout))
        }
        for part, hands in held.items():
            for device, hand in zip(device_names(recipe), hands, strict=True):
                _write(self.texts(device, part), hand, recipe)
        return {
            device: {label: sum(example.label == label for example in hand) for label in split.labels}
            for device, hand in zip(device_names(recipe), held["train"], strict=True)
        }


def device_names(recipe: Recipe) -> list[str]:
    """device-1, device-2, …"""
    return [f"device-{number}" for number in range(1, recipe.devices + 1)]


def _write(path: Path, examples: Iterable[Example], recipe: Recipe) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled = recipe.task == "classify"
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            fields = example._asdict() if labelled else {"text": example.text}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
