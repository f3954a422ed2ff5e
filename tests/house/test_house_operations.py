"""``docs/operations.md`` and the files beside it name commands and options that exist, and units that stay shut in."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import click
import pytest

from cloud.config import ServerConfig
from edge_runtime.cli import main
from tests.house.sources import ROOT

pytestmark = pytest.mark.house

DOCS = ROOT / "docs"
PAGE = DOCS / "operations.md"
UNITS = sorted((DOCS / "systemd").glob("*.service"))
# Without these a fault in a parser reaches more than the data folder.
SHUT_IN = {
    "NoNewPrivileges": "true",
    "ProtectSystem": "strict",
    "ProtectHome": "true",
    "PrivateTmp": "true",
    "StateDirectory": "emberlora",
    "User": "emberlora",
    "CapabilityBoundingSet": "",
    "LimitCORE": "0",
}


def wrong(line: str) -> list[str]:
    """What a command line names that is not there: a command, or options of it."""
    command: click.Command = main
    words = shlex.split(line, comments=True)[1:]
    while isinstance(command, click.Group):
        name = words.pop(0) if words else ""
        found = command.get_command(click.Context(command), name)
        if found is None:
            return [f"{line}: no command {name!r}"]
        command = found
    known = {name for parameter in command.params for name in parameter.opts}
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [f"{line}: no option {option}" for option in options if option not in known]


def service(path: Path) -> configparser.SectionProxy:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys are case-sensitive
    unit.read_string(path.read_text(encoding="utf-8"))
    return unit["Service"]


def test_a_wrong_line_is_found() -> None:
    assert wrong("emberlora cloud serve --config server --json # --not-read") == []
    assert wrong("emberlora cloud serve --conf server") == ["emberlora cloud serve --conf server: no option --conf"]
    assert wrong("emberlora cloud sereve") == ["emberlora cloud sereve: no command 'sereve'"]


def test_every_command_of_the_page_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    found = re.findall(r"(?:^|[ /`])(emberlora (?:cloud|edge|export) [a-z][^`\n]*)", blocks, re.MULTILINE)
    found += re.findall(r"`[^`\n]*?\b(emberlora (?:cloud|edge|export) [a-z][^`\n]*)`", text)
    said = "emberlora cloud: "  # what a command answers
    lines = [line for line in found if not line.startswith(said)]
    assert len(lines) > 20
    assert [problem for line in lines for problem in wrong(line)] == []


def test_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(links) >= 5
    assert [link for link in links if not (DOCS / link).exists()] == []


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_what_exists_and_is_shut_in(path: Path) -> None:
    found = service(path)
    assert wrong(found["ExecStart"].rpartition("/bin/")[2]) == []
    assert {key: found.get(key) for key in SHUT_IN} == SHUT_IN
    # 2 is bad usage or input in every command: it stays so until somebody acts.
    assert (found["Restart"], found["RestartPreventExitStatus"]) == ("on-failure", "2")


def test_the_servers_unit_has_room_for_its_connections() -> None:
    found = service(DOCS / "systemd" / "emberlora-cloud.service")
    assert int(found["LimitNOFILE"]) >= ServerConfig().max_connections + 1024  # the rest: blobs, bundle, database


def test_the_container_starts_what_exists() -> None:
    text = (DOCS / "Containerfile").read_text(encoding="utf-8")
    parts = [
        re.findall(r'"([^"]+)"', re.findall(rf"^{key} \[(.*)\]$", text, re.MULTILINE)[0])
        for key in ("ENTRYPOINT", "CMD")
    ]
    assert wrong(shlex.join(parts[0] + parts[1])) == []
    assert "\nUSER emberlora\n" in text
