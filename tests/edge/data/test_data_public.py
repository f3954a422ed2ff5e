"""The public list of the package, and what it loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import edge_runtime.data
from edge_runtime.data import errors


def test_the_public_list_is_what_is_imported() -> None:
    tree = ast.parse(Path(edge_runtime.data.__file__ or "").read_text(encoding="utf-8"))
    imported = [name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert sorted(imported) == sorted(edge_runtime.data.__all__)
    assert (edge_runtime.data.__doc__ or "").strip().count(".") == 1


def test_every_error_is_in_the_tree_drawn_at_the_top() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(each, errors.DataError) and each.__name__ in (errors.__doc__ or "") for each in classes)
    assert len(classes) == 6


def test_it_loads_no_heavy_package_and_nothing_else_of_the_project() -> None:
    code = "import sys, edge_runtime.data; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "transformers", "jinja2", "pandas", "onnxruntime", "aiohttp"} & set(loaded)
    project = {name.split(".")[1] for name in loaded if name.startswith("edge_runtime.")}
    assert project == {"bundle", "data"}
