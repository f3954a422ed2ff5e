"""What a package offers, and what becomes of its errors."""

from __future__ import annotations

import ast
import importlib

import pytest

from edge_runtime.wire import WireError
from edge_runtime.wire.problems import PROBLEMS
from tests.house.sources import ROOT, Source

pytestmark = pytest.mark.house


def stated_all(source: Source) -> list[str] | None:
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return None


def submodules(source: Source) -> set[str]:
    """Names of the package's own modules, which it may import to use them."""
    return {path.stem for path in (ROOT / source.path).parent.iterdir()}


def isort_order(name: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions: the order ruff keeps."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_all_is_what_a_package_imports_sorted(sources: tuple[Source, ...]) -> None:
    """A package that imports anything has a one-sentence docstring and an ``__all__`` of exactly that."""
    for source in sources:
        imported = {
            name.asname or name.name
            for node in source.tree.body
            if isinstance(node, ast.ImportFrom) and node.module != "__future__"
            for name in node.names
        }
        if not source.is_package or not imported:
            continue
        names = stated_all(source)
        assert names is not None, f"{source.path}: no __all__"
        defined = {node.name for node in source.tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assigned = {ast.unparse(node.targets[0]) for node in source.tree.body if isinstance(node, ast.Assign)}
        assigned |= {ast.unparse(node.target) for node in source.tree.body if isinstance(node, ast.AnnAssign)}
        public = {name for name in imported - submodules(source) | defined | assigned if not name.startswith("_")}
        assert set(names) == public, source.path
        assert names == sorted(names, key=isort_order), f"{source.path}: __all__ is not sorted"
        assert ast.get_docstring(source.tree), f"{source.path}: no docstring"


def broad(handler: ast.ExceptHandler) -> bool:
    caught = [handler.type] if not isinstance(handler.type, ast.Tuple) else handler.type.elts
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught)


def excused(source: Source, line: int) -> bool:
    """``# noqa: BLE001`` with a reason behind it."""
    _, mark, reason = source.lines[line - 1].partition("BLE001")
    return bool(mark and len(reason.split()) >= 3)


def test_no_broad_except_without_a_reason(sources: tuple[Source, ...]) -> None:
    """A handler of everything raises again, or says on its line why it does not."""
    found = [
        f"{source.path}:{node.lineno}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler) and broad(node)
        if not excused(source, node.lineno) and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    ]
    assert found == []


def test_every_wire_error_that_can_be_raised_stands_in_the_table() -> None:
    """Each leaf of the tree has a row, and no two rows share a name."""
    importlib.import_module("edge_runtime.wire.errors")

    def leaves(kind: type[WireError]) -> set[type[WireError]]:
        below = [kind for kind in kind.__subclasses__() if kind.__module__ == WireError.__module__]
        return set().union(*map(leaves, below)) if below else {kind}

    assert leaves(WireError) == set(PROBLEMS)
    assert len({problem.name for problem in PROBLEMS.values()}) == len(PROBLEMS)
