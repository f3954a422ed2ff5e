"""Random examples and random adapters for a bundle, so that every gradient is there and none is symmetric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from edge_runtime.bundle import Bundle
from edge_runtime.data import Dataset, DatasetReport, Example
from edge_runtime.engine.parameters import AdapterParameters
from edge_runtime.wire import Layout


def random_dataset(bundle: Bundle, lengths: Iterable[int], *, seed: int = 0) -> Dataset:
    """Examples of these lengths in tokens; a language model trains about half of each."""
    rng = np.random.default_rng(seed)
    text = bundle.manifest.text
    examples = []
    for length in lengths:
        ids = rng.integers(4, min(text.vocab_size, 40), size=length).astype(np.int32)
        targets: int | np.ndarray = int(rng.integers(0, len(bundle.manifest.labels) or 1))
        if bundle.manifest.task == "lm":
            targets = rng.random(length) < 0.5
            targets[0], targets[-1] = False, True
        examples.append(Example(ids, targets, False))
    report = DatasetReport(
        files=(),
        task=bundle.manifest.task,
        max_tokens=text.max_tokens,
        examples=len(examples),
        tokens=0,
        trained_tokens=0,
        truncated=0,
        dropped=0,
        bad_count=0,
        bad_lines=(),
        ignored_fields=(),
        label_counts={},
    )
    return Dataset(tuple(examples), report, text.pad_id, text.max_tokens)


def random_parameters(bundle: Bundle, alive: Callable[[str], bool], *, seed: int = 0) -> AdapterParameters:
    """Every tensor random; alive are those whose name says so."""
    rng = np.random.default_rng(seed)
    adapter = {
        name: rng.normal(scale=0.1, size=tensor.shape).astype(np.float32)
        for name, tensor in sorted(bundle.initial_adapter().items())
    }
    chosen = [(name, tensor.shape) for name, tensor in adapter.items() if alive(name)]
    return AdapterParameters(adapter, Layout(tuple(chosen)))


def alive_from(bundle: Bundle, block: int) -> Callable[[str], bool]:
    """The factors of this block and those above it, and the head."""
    blocks = {module.name: module.block for module in bundle.manifest.modules}
    return lambda name: blocks.get(name.rpartition(".lora_")[0], len(bundle.manifest.blocks)) >= block


def relative_error(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], *, of: Sequence[str] = ()) -> float:
    """The worst relative L2 error over all tensors, which must be the same ones."""
    assert found.keys() == wanted.keys() != set()
    return max(
        float(np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])) for name in of or wanted
    )
