"""``docs/threat-model.md`` names only tests that exist, and none of its promises is without one."""

from __future__ import annotations

import ast
import re

from tests.house.sources import ROOT

PAGE = ROOT / "docs" / "threat-model.md"


def _tests() -> set[str]:
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_every_promise_names_tests_that_exist() -> None:
    promises = PAGE.read_text(encoding="utf-8").partition("## What is promised")[2].partition("\n## ")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    named = [re.findall(r"`(test_\w+)`", row) for row in rows]
    assert all(named), [row for row, names in zip(rows, named, strict=True) if not names]
    missing = sorted({name for names in named for name in names} - _tests())
    assert not missing
