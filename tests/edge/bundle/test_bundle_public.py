"""The public surface is one list, and it is what the package imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from edge_runtime import bundle
from edge_runtime.bundle import errors


def test_public_names_are_the_imported_ones() -> None:
    tree = ast.parse(Path(bundle.__file__).read_text(encoding="utf-8"))
    imported = [name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(imported) == sorted(set(imported)) == sorted(bundle.__all__)
    assert all(hasattr(bundle, name) for name in bundle.__all__)


def test_every_error_is_in_the_tree_drawn_at_the_top() -> None:
    drawn = errors.__doc__ or ""
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes == {word for word in drawn.split() if word.endswith("Error")}


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, edge_runtime.bundle; print(*(m for m in sys.modules if m.split('.')[0] in "
        "('torch', 'onnx', 'onnxruntime', 'aiohttp', 'safetensors', 'cryptography') or "
        "m.startswith('edge_runtime.') and not m.startswith('edge_runtime.bundle')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
