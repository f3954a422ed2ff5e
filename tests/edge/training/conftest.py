"""A small BERT, its engine and some texts, for tests that train. Files that want others have their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.bundle import Bundle, open_bundle
from edge_runtime.data import Dataset
from edge_runtime.engine.model import BlockEngine
from tests.edge.training.random_learning import random_dataset

LENGTHS = (3, 14, 12, 25, 11, 7, 30, 33, 5, 16)  # of its examples, in tokens


@pytest.fixture(scope="module")
def bundle(bert_bundle: Path) -> Bundle:
    return open_bundle(bert_bundle)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> BlockEngine:
    return BlockEngine(bundle)


@pytest.fixture(scope="module")
def dataset(bundle: Bundle) -> Dataset:
    return random_dataset(bundle, LENGTHS)
