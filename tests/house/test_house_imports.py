"""Who may import whom. See the README's picture of the layout."""

from __future__ import annotations

import ast

import pytest

from tests.house.sources import Source

pytestmark = pytest.mark.house

PROJECT = ("edge_runtime", "cloud", "export")
SHARED = ("edge_runtime.wire", "edge_runtime.bundle")

# Part of the project -> what of the project it may import besides itself; the longest name that fits counts.
MAY_IMPORT = {
    "edge_runtime.wire": (),
    "edge_runtime.bundle": (),
    "edge_runtime": (),
    "cloud": SHARED,
    "cloud.demo": (*SHARED, "cloud.planlog", "cloud.plans_page"),  # it reads and draws what `cloud plans` prints
    "export": SHARED,
}

# A heavy dependency -> the only places that may import it.
HOMES = {
    "torch": ("export",),
    "transformers": ("export",),
    "peft": ("export",),
    "onnxscript": ("export",),
    "onnxruntime": ("edge_runtime.engine", "export"),
    "onnx": ("export", "edge_runtime.engine.ort_training"),  # onnxruntime-training brings it
    "google": ("edge_runtime.engine",),
    "tokenizers": ("edge_runtime.data", "edge_runtime.training", "export"),
    "aiohttp": ("cloud.http", "cloud.operator", "edge_runtime.device"),
    "sqlalchemy": ("cloud.store",),
    "alembic": ("cloud.store",),
    "obstore": ("cloud.store",),
    "sklearn": ("cloud.demo",),
    "plotly": ("cloud.demo", "cloud.plans_page", "cloud.pilot.page"),
    "rich": ("cloud",),
    "safetensors": ("export",),
    "keyring": ("edge_runtime.device",),
}


def inside(module: str, *places: str) -> bool:
    return any(module == place or module.startswith(place + ".") for place in places)


def violations(source: Source) -> list[str]:
    part = max((part for part in MAY_IMPORT if inside(source.module, part)), key=len)
    allowed = (part, *MAY_IMPORT[part])
    found = []
    for name, line in source.imports():
        if inside(name, *PROJECT) and not inside(name, *allowed):
            found.append(f"{source.path}:{line}: {part} must not import {name}")
        home = HOMES.get(name.split(".")[0])
        if home and not inside(source.module, *home):
            found.append(f"{source.path}:{line}: only {' and '.join(home)} may import {name}")
    return found


def test_every_import_is_allowed(sources: tuple[Source, ...]) -> None:
    """The packages depend in one direction, and every heavy dependency lives at one edge."""
    assert [line for source in sources for line in violations(source)] == []


def test_the_edge_package_imports_nothing_at_its_top(sources: tuple[Source, ...]) -> None:
    """Importing ``edge_runtime.wire`` must not load the engine."""
    top = next(source for source in sources if source.module == "edge_runtime")
    assert top.imports() == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("cloud.rounds", "from edge_runtime.engine import Session"),
        ("cloud.demo.command", "from cloud.config import Config"),
        ("cloud.rounds", "import export.model"),
        ("export.model", "from cloud import rounds"),
        ("edge_runtime.wire.plan", "from edge_runtime.bundle import Manifest"),
        ("edge_runtime.data.files", "import cloud"),
        ("edge_runtime.device.run", "import torch.nn"),
        ("cloud.rounds", "def f():\n    import aiohttp"),
    ],
)
def test_a_forbidden_import_is_found(module: str, text: str) -> None:
    """The rule sees what it is meant to see, also inside functions."""
    assert violations(Source(module, "x.py", [], ast.parse(text)))
