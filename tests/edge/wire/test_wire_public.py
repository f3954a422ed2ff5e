"""The public surface is one list, and it is what the package imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from edge_runtime import wire


def test_public_names_are_the_imported_ones() -> None:
    tree = ast.parse(Path(wire.__file__).read_text(encoding="utf-8"))
    imported = [
        name.asname or name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names
    ]
    assert sorted(imported) == sorted(set(imported)) == sorted(wire.__all__)
    assert all(hasattr(wire, name) for name in wire.__all__)


def test_importing_it_loads_nothing_heavy() -> None:
    """Only msgspec and cryptography, and nothing else of the project: a waiting device does without numpy."""
    code = (
        "import sys, edge_runtime.wire; print(*(m for m in sys.modules if m.split('.')[0] in "
        "('torch', 'numpy', 'onnx', 'onnxruntime', 'aiohttp', 'tokenizers') or "
        "m.startswith('edge_runtime.') and not m.startswith('edge_runtime.wire')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
