"""The training loop: what it remembers, for how long, and that the data may be long."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.bundle import Bundle
from edge_runtime.data import Dataset
from edge_runtime.engine.model import BlockEngine
from edge_runtime.engine.remembered import RememberedHidden
from edge_runtime.training.local import Course, train
from edge_runtime.wire import Training
from tests.edge.training.random_learning import alive_from, random_parameters

HALF = 5e-3  # of the change: gradients are off by 2e-3, and AdamW divides them by their own size


def course(dataset: Dataset, memory: RememberedHidden | None = None, *, epochs: int = 3, micro: int = 4096) -> Course:
    settings = Training(batch_size=4, max_tokens=64, lr_a=1e-2, lr_b=1e-2, lr_head=1e-2, epochs=epochs)
    return Course(dataset, settings, np.random.default_rng(0), micro_tokens=micro, remembered=memory)


def learned(engine: BlockEngine, bundle: Bundle, of: Course, *, lowest: int = 2) -> np.ndarray:
    parameters = random_parameters(bundle, alive_from(bundle, lowest))
    train(engine, parameters, of)
    return parameters.change()


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("lowest", [1, 2, 3])
def test_remembering_learns_the_same(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset, tmp_path: Path, lowest: int
) -> None:
    memory = RememberedHidden(tmp_path, max_bytes=1 << 20)
    found = learned(engine, bundle, course(dataset, memory), lowest=lowest)
    wanted = learned(engine, bundle, course(dataset), lowest=lowest)
    assert 0 < difference(found, wanted) < HALF
    assert memory.used_bytes > 0
    assert memory.trouble is None


def test_the_memory_ends_with_the_training(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset, tmp_path: Path
) -> None:
    """Also when it is stopped half way."""
    memory = RememberedHidden(tmp_path, max_bytes=1 << 20)

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 2:
            assert memory.examples >= 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(engine, random_parameters(bundle, alive_from(bundle, 2)), course(dataset, memory), on_step=stop)
    assert (memory.examples, memory._file) == (0, None)
    assert list(tmp_path.iterdir()) == []


def test_a_single_epoch_writes_nothing(bundle: Bundle, engine: BlockEngine, dataset: Dataset, tmp_path: Path) -> None:
    """What is seen once is not worth the disk."""
    memory = RememberedHidden(tmp_path, max_bytes=1 << 20)
    learned(engine, bundle, course(dataset, memory, epochs=1))
    assert memory.used_bytes == 0


def test_a_full_disk_changes_nothing_of_the_training(
    bundle: Bundle, engine: BlockEngine, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first byte on: the same update, to the bit."""

    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    memory = RememberedHidden(tmp_path, max_bytes=1 << 20)
    found = learned(engine, bundle, course(dataset, memory))
    np.testing.assert_array_equal(found, learned(engine, bundle, course(dataset)))
    assert memory.trouble is not None


def test_small_pieces_learn_the_same(bundle: Bundle, engine: BlockEngine, dataset: Dataset, tmp_path: Path) -> None:
    """With and without a memory; AdamW's first steps divide by gradients near zero, hence the tolerance."""
    wanted = learned(engine, bundle, course(dataset))
    assert difference(learned(engine, bundle, course(dataset, micro=32)), wanted) < 1e-3
    memory = RememberedHidden(tmp_path, max_bytes=1 << 20)
    assert difference(learned(engine, bundle, course(dataset, memory, micro=32)), wanted) < HALF
