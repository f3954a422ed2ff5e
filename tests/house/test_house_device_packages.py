"""``requirements-device.txt`` is what the base install needs, less what its dependencies declare and never use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires

import msgspec
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.sources import ROOT

pytestmark = pytest.mark.house

# tokenizers imports its hub client in ``from_pretrained`` only; onnxruntime 1.23 these two in its tools only.
LEFT_OUT = {"huggingface-hub", "sympy", "coloredlogs"}


def applying(lines: list[str]) -> Iterator[str]:
    """Names of the requirements that hold for this interpreter without extras."""
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def test_the_list_is_complete_and_short() -> None:
    """Walked from pyproject.toml through what the installed packages declare."""
    project = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]
    pending, needed = list(applying(project["dependencies"])), set[str]()
    while pending:
        name = pending.pop()
        if name not in needed | LEFT_OUT:
            needed.add(name)
            pending += applying(requires(name) or [])
    lines = (ROOT / "requirements-device.txt").read_text(encoding="utf-8").splitlines()
    assert "-c constraints.txt" in lines
    assert set(applying([line for line in lines if line and not line.startswith(("#", "-"))])) == needed


def test_the_project_itself_imports_nothing_that_is_left_out() -> None:
    """Nor does importing the two packages that declare it."""
    code = (
        "import sys, onnxruntime, tokenizers, edge_runtime.data, edge_runtime.engine.model; "
        "print(sorted({'huggingface_hub', 'sympy', 'coloredlogs', 'onnx', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
