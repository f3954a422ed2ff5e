"""Size budgets. They bind the tails; ``# budget: reason`` on the line of a ``def`` or ``class`` exempts it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.house.sources import Source

pytestmark = pytest.mark.house

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 50  # from def to end, docstring not counted
MAX_PARAMETERS = 6  # self and cls not counted
MAX_DEPTH = 2  # project classes above a class; exceptions and their trees are exempt
EXEMPT = re.compile(r"#\s*budget:\s*\S")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: Source) -> Iterator[Function]:
    for node in ast.walk(source.tree):
        if isinstance(node, Function) and not EXEMPT.search(source.lines[node.lineno - 1]):
            yield node


def length(function: Function) -> int:
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def parameters(function: Function) -> int:
    names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def is_command(function: Function) -> bool:
    """A click command's parameters are its options, of which a user may have many."""
    return any("option" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_file_is_too_long(sources: tuple[Source, ...]) -> None:
    long = {source.path: len(source.lines) for source in sources if len(source.lines) > MAX_FILE_LINES}
    assert long == {}


def test_no_function_is_too_long(sources: tuple[Source, ...]) -> None:
    long = {
        f"{source.path}:{function.lineno} {function.name}": length(function)
        for source in sources
        for function in functions(source)
        if length(function) > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_no_function_has_too_many_parameters(sources: tuple[Source, ...]) -> None:
    many = {
        f"{source.path}:{function.lineno} {function.name}": parameters(function)
        for source in sources
        for function in functions(source)
        if parameters(function) > MAX_PARAMETERS and not is_command(function)
    }
    assert many == {}


def test_no_class_stands_on_a_tower(sources: tuple[Source, ...]) -> None:
    """At most two project classes above a class; error trees are as deep as who must act needs."""
    classes = {
        node.name: node for source in sources for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)
    }

    def bases(name: str) -> list[str]:
        return [ast.unparse(base).split(".")[-1].split("[")[0] for base in classes[name].bases]

    def depth(name: str) -> int:
        return max((1 + depth(base) for base in bases(name) if base in classes), default=0)

    tall = {name: depth(name) for name in classes if not name.endswith("Error") and depth(name) > MAX_DEPTH}
    assert tall == {}


def test_the_measures_measure() -> None:
    """The helpers see a long function, its docstring, and its parameters."""
    body = "\n".join("    x = 1" for _ in range(51))
    tree = ast.parse(f'def f(self, a, /, b, *, c):\n    """Doc.\n\n    More.\n    """\n{body}\n')
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    assert length(function) == 52
    assert parameters(function) == 3
