"""The two tasks: which model learns what, with which settings, and the files of examples and bundles it needs.

Everything that decides the result is the same for all systems: examples, their order, the adapter at the start, rates.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from bench.errors import RequestError, UnavailableError
from edge_runtime.bundle import Array, Base, Manifest, Task, open_bundle, write_peft_folder
from edge_runtime.wire import Training

RANK = 8
_HEAD_STD = 0.02  # of a new classifier, as transformers draws it
_SHOWN_LINES = 3  # of a failed export


class Recipe(msgspec.Struct, frozen=True):
    """One task.

    Attributes:
        name: As in the results.
        model: The preset that learns.
        task: What it learns.
        metric: "accuracy" from 0 to 1, or "loss" in nats a trained token, on the held-out examples.
        batch_size: Examples a step.
        max_tokens: Of an example, padding not counted.
        lr: Learning rate of both LoRA factors at the start; it falls to a tenth by a cosine.
        lr_head: The same of a trained head; 0 where there is none.
        held_out: Examples that are measured.
        held_out_quick: The same for ``--quick``.
    """

    name: str
    model: str
    task: Task
    metric: str
    batch_size: int
    max_tokens: int
    lr: float
    lr_head: float
    held_out: int
    held_out_quick: int

    def training(self, steps: int) -> Training:
        """The settings as the training loop takes them; AdamW without weight decay, no clipping."""
        return Training(self.batch_size, self.max_tokens, self.lr, self.lr, self.lr_head, steps=steps)


# The rates were chosen by short trials of the fp32 bundle; every system has the same.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("clinc150", "minilm", "classify", "accuracy", 32, 64, 2e-3, 2e-2, 600, 150),
        Recipe("gsm8k", "smollm2", "lm", "loss", 4, 128, 1e-3, 0.0, 64, 16),
    )
}
_GSM8K_CHARS = 280  # question and answer together: the shortest twelfth, nearly all of them within 128 tokens


class Examples(msgspec.Struct, frozen=True):
    """Files of records as ``emberlora edge train`` reads them."""

    train: Path
    held_out: Path


def write_examples(recipe: Recipe, data: Path, folder: Path, *, quick: bool) -> Examples:
    """Write both files.

    Args:
        recipe: The task.
        data: Folder with ``text_clinc150`` and ``lm_gsm8k``.
        folder: Where to write; made when it is not there.
        quick: Fewer held-out examples.

    Raises:
        RequestError: ``data`` has not what the task needs.
    """
    count = recipe.held_out_quick if quick else recipe.held_out
    try:
        train, held_out = _clinc150(data, count) if recipe.task == "classify" else _gsm8k(data, count)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{data}: not the data of task {recipe.name}: {type(error).__name__} {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    found = Examples(folder / f"{recipe.name}-train.jsonl", folder / f"{recipe.name}-held-out-{count}.jsonl")
    for path, records in ((found.train, train), (found.held_out, held_out)):
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return found


Records = list[dict[str, str]]


def _clinc150(data: Path, count: int) -> tuple[Records, Records]:
    """All training queries, and of the validation queries the first of every intent, equally many of each."""
    splits = json.loads((data / "text_clinc150" / "data_full.json").read_text(encoding="utf-8"))
    records = {
        name: [{"text": text, "label": label} for text, label in splits[name] if text.strip()]
        for name in ("train", "val")
    }
    by_label: dict[str, Records] = defaultdict(list)
    for record in records["val"]:
        by_label[record["label"]].append(record)
    each = -(-count // len(by_label))
    return records["train"], [record for label in sorted(by_label) for record in by_label[label][:each]][:count]


def _gsm8k(data: Path, count: int) -> tuple[Records, Records]:
    """Short problems with short answers; held out are the first of the test split."""
    train, test = (list(_short_problems(data / "lm_gsm8k" / f"{name}.jsonl")) for name in ("train", "test"))
    return train, test[:count]


def _short_problems(path: Path) -> Iterator[dict[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        problem = json.loads(line)
        question, answer = problem["question"].strip(), problem["answer"].strip()
        if len(question) + len(answer) <= _GSM8K_CHARS:
            yield {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def ensure_bundle(recipe: Recipe, base: Base, folder: Path, train: Path) -> Path:
    """The task's bundle of this base; exported unless ``folder`` has it from before.

    Raises:
        UnavailableError: the export failed; with what it said.
    """
    out = folder / f"{recipe.name}-{base}"
    if out.exists():
        return out
    command = [sys.executable, "-W", "ignore", "-m", "edge_runtime.cli", "export", "--model", recipe.model]
    command += ["--task", recipe.task, "--rank", str(RANK), "--max-tokens", str(recipe.max_tokens)]
    if recipe.task == "classify":
        command += ["--labels-from", str(train)]
    command += ["--base", base, "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " / ".join(done.stderr.strip().splitlines()[-_SHOWN_LINES:]) or "nothing was said"
        raise UnavailableError(f"export of {recipe.name}, base {base}: {said}")
    return out


def ensure_start(bundle: Path, folder: Path, seed: int) -> Path:
    """The adapter that every system starts from with this seed, a peft folder; written unless it is there."""
    if not (folder / "adapter_model.safetensors").exists():
        manifest = open_bundle(bundle, verify=False).manifest
        names = open_bundle(bundle, verify=False).initial_adapter()
        write_peft_folder(folder, manifest, draw_adapter(manifest, names, np.random.default_rng(seed)))
    return folder


def draw_adapter(manifest: Manifest, like: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """An adapter as peft draws it: A uniform within 1/√in, B zero; a head's weights normal, its bias zero.

    Args:
        manifest: The bundle's.
        like: Its initial adapter, for names and shapes.
        rng: Advanced tensor by tensor, in the order of the names.
    """
    bounds = {f"{module.name}.lora_a": 1 / np.sqrt(module.in_features) for module in manifest.modules}
    drawn: dict[str, Array] = {}
    for name in sorted(like):
        shape = like[name].shape
        if name in bounds:
            drawn[name] = rng.uniform(-bounds[name], bounds[name], size=shape).astype(np.float32)
        elif name.endswith(".lora_b") or len(shape) < 2:
            drawn[name] = np.zeros(shape, np.float32)
        else:
            drawn[name] = rng.normal(scale=_HEAD_STD, size=shape).astype(np.float32)
    return drawn
