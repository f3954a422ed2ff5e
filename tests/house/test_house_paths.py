"""No file of the project knows one particular machine."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.house.sources import ROOT

pytestmark = pytest.mark.house

# Written in pieces, so that this file does not find itself.
PLACES = re.compile(
    "|".join(("/" + "work/", "/" + "root/", "/" + "home/[a-z]", "/" + "Users/[a-z]", r"[A-Z]:\\\\Users"))
)
HOSTS = re.compile("|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org", "npmjs" + r"\.", "debian" + r"\.org")))


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_place_or_a_registry() -> None:
    found = []
    for name in tracked():
        text = (ROOT / name).read_bytes().decode("utf-8", "replace")
        found += [f"{name}: {match.group()}" for rule in (PLACES, HOSTS) for match in rule.finditer(text)]
    assert found == []
