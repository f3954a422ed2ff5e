"""``docs/wire.md`` says what the code does: its tables are compared with the code."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path

import msgspec
import pytest

from edge_runtime.device import client
from edge_runtime.wire import (
    Capability,
    Enrolled,
    Enrolment,
    KeyStatement,
    ModulePlan,
    Plan,
    PlanKeyRotation,
    Quantisation,
    Tier,
    TokenAnswer,
    TokenRequest,
    Training,
    UpdateReceipt,
    UpdateRules,
    messages,
    patch_frame,
    plan,
    requests,
    resources,
)
from edge_runtime.wire import update as frame
from edge_runtime.wire.plankeys import MAX_STATEMENTS
from edge_runtime.wire.problems import PROBLEMS

PAGE = (Path(__file__).parents[3] / "docs" / "wire.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """The text under a heading up to the next one of the same or a higher level."""
    level = heading.split(" ")[0]
    start = PAGE.index(f"\n{heading}\n")
    end = re.compile(rf"\n#{{1,{len(level)}}} ").search(PAGE, start + len(heading) + 2)
    return PAGE[start : end.start() if end else len(PAGE)]


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows but heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    body = [line for line, after in zip(lines, [*lines[1:], ""], strict=True) if not after.startswith("|--")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body if not line.startswith("|--")]


def test_problem_table() -> None:
    said = {row[0]: tuple(row[1:3]) for row in rows(section("## Problems"))}
    meant = {
        f"`{problem.name}`": (str(problem.status), "–" if problem.retry_s is None else f"{problem.retry_s:g} s")
        for problem in PROBLEMS.values()
    }
    assert said == meant


def test_plan_fields() -> None:
    said = [name for row in rows(section("## Plan")) for name in re.findall(r"`(\w+)`", row[0])]
    meant = [name for kind in (Plan, Training, UpdateRules, Quantisation, Tier) for name in kind.__struct_fields__]
    assert said == meant


def test_module_fields() -> None:
    row = next(row for row in rows(section("## Plan")) if row[0] == "`modules`")
    assert [name for name in re.findall(r"`(\w+)`", row[2]) if name.islower()] == list(ModulePlan.__struct_fields__)


@pytest.mark.parametrize("kind", [Enrolment, Enrolled, TokenRequest, TokenAnswer, PlanKeyRotation, UpdateReceipt])
def test_message_fields(kind: type[msgspec.Struct]) -> None:
    said = {row[0]: re.findall(r"`(\w+)`", row[1]) for row in rows(section("## Enrolment token"))}
    assert said[f"`{kind.__name__}`"] == list(kind.__struct_fields__)


def test_key_statement_fields() -> None:
    said = [row[0].strip("`") for row in rows(section("## Change of the plan key"))]
    assert said == list(KeyStatement.__struct_fields__)
    assert f"0 to {MAX_STATEMENTS} `KeyStatement`" in PAGE


def test_capability_fields() -> None:
    said = [row[0].strip("`") for row in rows(section("## Capability"))]
    assert said == list(Capability.__struct_fields__)


def test_frame_offsets() -> None:
    """Offsets and sizes are those of the structs, and every field follows the one before."""
    table = [row for row in rows(section("## Update frame")) if row[0][0].isdigit()]
    fixed = [(int(row[0]), int(row[1])) for row in table if row[0].isdigit() and row[1].isdigit()]
    trailer = [(int(row[0].split()[0]), int(row[1])) for row in table if "+" in row[0]]
    for fields, start, layout in ((fixed, 0, frame._HEADER), (trailer, 88, frame._TRAILER)):
        assert fields[0][0] == start
        assert all(offset + size == after for (offset, size), (after, _) in itertools.pairwise(fields))
        assert fields[-1][0] + fields[-1][1] == start + layout.size
        codes = re.findall(r"\d*[a-zA-Z]", layout.format)
        assert [size for _, size in fields] == [
            struct.calcsize("<" + code) for codes_ in codes for code in _single(codes_)
        ]
    assert frame._HEADER.size + frame._TRAILER.size == 148


def test_patch_offsets() -> None:
    fields = [(int(row[0]), row[1]) for row in rows(section("## Adapter patch")) if row[0].isdigit()]
    sizes = [struct.calcsize("<" + code) for code in re.findall(r"\d*[a-zA-Z]", patch_frame._HEADER.format)]
    assert [size for _, size in fields] == [*map(str, sizes), "⌈n/8⌉"]
    assert [offset for offset, _ in fields] == list(itertools.accumulate(sizes, initial=0))


def _single(code: str) -> list[str]:
    """``3I`` is three fields, ``32s`` is one."""
    return [code] if code.endswith("s") else [code[-1]] * int(code[:-1] or 1)


def test_resources() -> None:
    said = " ".join(row[0] for row in rows(section("## Resources")))
    paths = [value for name, value in vars(resources).items() if name.isupper() and isinstance(value, str)]
    assert len(paths) == 16
    for path in paths:
        assert re.search(rf"{re.escape(path)}[?`]", said), path
    assert resources.plan_target("sst2", after=-1, wait_s=60) == "/v1/tasks/sst2/plan?after=-1&wait=60"
    assert resources.patch_target("sst2", 7, since=-1) == "/v1/tasks/sst2/rounds/7/adapter?since=-1&reads=3"
    assert resources.capability_path("sst2", "pi-4") == "/v1/tasks/sst2/devices/pi-4/capability"
    assert resources.update_path("sst2", 7, "pi-4") == "/v1/tasks/sst2/rounds/7/updates/pi-4"
    parts = resources.parts_path("sst2", 7, "pi-4", "ad")
    assert parts == "/v1/tasks/sst2/rounds/7/updates/pi-4/parts/ad"
    assert resources.part_target(parts, offset=5, of=9) == parts + "?offset=5&of=9"


def test_limits() -> None:
    assert plan.MAX_PLAN_BYTES == 1 << 20
    assert f"1 to {plan.MAX_PLAN_BYTES - 64:,} |" in section("## Plan")
    assert f"≤ {requests.MAX_CLOCK_SKEW_S} s" in section("## Signed request")
    assert (messages.MAX_MESSAGE_BYTES, messages.MAX_STATUS_BYTES) == (64 << 10, 16 << 20)
    assert "at most 64 KiB, a `TaskStatus` at most 16 MiB" in PAGE
    assert f"(at most {resources.MAX_WAIT_S})" in section("## Resources")
    assert resources.MAX_PART_BYTES == 1 << 20
    assert "of that update, at most 1 MiB" in section("## Resources")
    assert client.PART_BYTES == 256 << 10
    assert "more than 256 KiB in parts" in section("## Resources")
