"""``emberlora cloud audit``: what it prints, its exit codes, and what it finds in a store that somebody changed."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import closing

import aiohttp
import msgspec
import pytest
from click.testing import CliRunner, Result
from cloud_fleet import START, Device, Site, values_for

from cloud.commands import cloud
from edge_runtime import wire


async def run(site: Site, *args: str) -> Result:
    """In a thread: a command has an event loop of its own."""
    return await asyncio.to_thread(CliRunner().invoke, cloud, [*args, "--config", str(site.folder)])


async def lines(site: Site, *args: str) -> list[dict]:
    result = await run(site, "audit", *args, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def one_line(result: Result) -> str:
    assert result.stderr.startswith("emberlora cloud: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("emberlora cloud: ").rstrip()


def sql(site: Site, *statements: str) -> None:
    with closing(sqlite3.connect(site.config.data_path / "emberlora.sqlite3")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


async def put(device: Device, signed: wire.SignedPlan) -> wire.UpdateReceipt:
    frame = device.frame(signed, values_for(device.site, signed, 1))
    return wire.decode_message((await device.put(signed, device.seal(signed, frame))).body, wire.UpdateReceipt)


@pytest.fixture
async def devices(site: Site, session: aiohttp.ClientSession) -> tuple[Device, Device]:
    """Two devices of which the first was refused once, after one applied round. Entries 0 to 9."""
    one, two = await site.device(session, "one"), await site.device(session, "two")
    signed = await one.plan()
    await one.put(signed, b"x")
    await site.server.aggregator.members.flush()
    await put(one, signed)
    await put(two, signed)
    await one.plan(after=0)
    return one, two


async def test_verify_while_the_server_runs_and_after(site: Site, devices: tuple[Device, Device]) -> None:
    head = (await site.operator.status()).audit_head
    noted = await run(site, "audit", "verify", "--head", head)
    assert (noted.exit_code, noted.stdout) == (0, f"whole: 11 entries, as stored; head {head}\n")
    await put(devices[0], await devices[0].plan())
    newer = (await site.operator.status()).audit_head
    assert newer != head
    await site.close()
    expected = {"whole": True, "entries": 12, "head": newer, "broken": None, "how": None}
    assert await lines(site, "verify", "--head", head) == [expected]  # it is still in there
    again = await lines(site, "verify")
    assert again == [expected]  # and looking added nothing


CHANGES = {
    "edited": ("UPDATE audit SET text = replace(text, '\"two\"', '\"one\"') WHERE number = 8", 8, "edited"),
    "time": ("UPDATE audit SET time_ms = 0 WHERE number = 3", 3, "edited"),
    "digest": (f"UPDATE audit SET digest = '{'ab' * 32}' WHERE number = 4", 4, "edited"),
    "removed": ("DELETE FROM audit WHERE number = 5", 5, "removed: the next entry has number 6"),
    "renumbered": (
        "DELETE FROM audit WHERE number = 5; UPDATE audit SET number = number - 1 WHERE number > 5",
        5,
        "out of place",
    ),
    "emptied": ("DELETE FROM audit", 0, "missing"),
    "update edited": ("UPDATE updates SET digest = 'ab' WHERE device = 'one'", 7, "the store does not say so: update"),
    "update removed": ("DELETE FROM updates WHERE device = 'two'", 8, "the store does not say so: update of two"),
    "update added": (
        "INSERT INTO updates SELECT 1, device, digest, weight, bytes, received, metrics FROM updates WHERE weight > 0",
        10,
        "no entry up to this one says",
    ),
    "plan edited": ("UPDATE rounds SET plan = x'00' WHERE round = 1", 10, "the store does not say so: plan of round 1"),
    "round edited": ("UPDATE rounds SET summary = '{}' WHERE round = 0", 9, "the store does not say so: round 0: app"),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_verify_finds_what_was_changed(site: Site, devices: tuple[Device, Device], change: str) -> None:
    statements, number, how = CHANGES[change]
    await site.close()
    sql(site, *statements.split(";"))
    result = await run(site, "audit", "verify")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert one_line(result).startswith(f"audit log: entry {number}: {how}")
    told = await run(site, "audit", "verify", "--json")
    assert told.exit_code == 1
    found = json.loads(told.stdout)
    assert (found["whole"], found["broken"]) == (False, number)
    assert found["how"].startswith(how)


async def test_a_cut_end_is_seen_by_a_head_that_was_noted(site: Site, devices: tuple[Device, Device]) -> None:
    await devices[0].put(await devices[0].plan(), b"x")
    head = (await site.operator.status()).audit_head
    await site.close()
    sql(site, "DELETE FROM audit WHERE number = (SELECT max(number) FROM audit)")
    assert (await run(site, "audit", "verify")).exit_code == 0
    result = await run(site, "audit", "verify", "--head", head)
    assert result.exit_code == 1
    how = f"the head {head[:12]} is not in it: its end was cut off, or it was written anew"
    assert one_line(result) == f"audit log: {how}"
    told = json.loads((await run(site, "audit", "verify", "--head", head, "--json")).stdout)
    assert (told["whole"], told["broken"], told["how"]) == (False, None, how)


async def test_show_for_people(site: Site, devices: tuple[Device, Device]) -> None:
    shown = (await run(site, "audit", "show")).stdout.splitlines()
    assert len(shown) == 11
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(START))
    assert shown[0] == f"0   {when}  log-begun        task tiny, bundle {site.bundle.digest[:12]}"
    assert shown[6] == f"6   {when}  update-refused   round 0, device one, problem update-format"
    assert shown[10].endswith("finished false")


async def test_show_filters(site: Site, devices: tuple[Device, Device]) -> None:
    assert [line["number"] for line in await lines(site, "show", "--kind", "update-counted")] == [7, 8]
    assert [line["number"] for line in await lines(site, "show", "--device", "one")] == [2, 3, 6, 7]
    assert [line["number"] for line in await lines(site, "show", "--device", "one", "--round", "0")] == [6, 7]
    assert [line["number"] for line in await lines(site, "show", "--round", "1")] == [10]
    later = 300  # before the round's deadline: a round that closes while the log is read would add an entry
    site.clock.now += later
    receipt = await put(devices[0], await devices[0].plan())
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(START + later))
    (line,) = await lines(site, "show", "--since", since)
    assert (line["number"], line["time"]) == (11, START + later)
    assert line["entry"] == {"kind": "update-counted"} | msgspec.structs.asdict(receipt)
    assert line["digest"] == (await site.operator.status()).audit_head


async def test_status_shows_the_head(site: Site, devices: tuple[Device, Device]) -> None:
    site.clock.now = time.time()  # the command's clock is the real one
    status = await run(site, "status", "--json")
    head = json.loads(status.stdout)["audit_head"]
    assert len(head) == 64
    text = (await run(site, "status")).stdout
    assert head in text.replace("\n", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("verify", "--head", "5f0c"), "--head '5f0c': expected a SHA-256, 64 digits 0-9 and a-f"),
        (("show", "--device", "A B"), "device 'A B': expected"),
        (("show", "--round", "7"), "holds no such entry"),
    ],
)
async def test_bad_input_is_one_line_and_status_two(site: Site, args: tuple[str, ...], message: str) -> None:
    result = await run(site, "audit", *args)
    assert result.exit_code == 2
    assert message in one_line(result)


@pytest.mark.parametrize("args", [("--kind", "stopped"), ("--since", "yesterday"), ("--round", "-1")])
async def test_bad_usage_has_status_two(site: Site, args: tuple[str, ...]) -> None:
    assert (await run(site, "audit", "show", *args)).exit_code == 2


async def test_an_entry_of_a_later_version_is_said(site: Site) -> None:
    await site.close()
    sql(site, """UPDATE audit SET text = '{"kind":"moon-seen"}' WHERE number = 1""")
    result = await run(site, "audit", "show")
    assert result.exit_code == 2
    assert one_line(result).startswith("audit log: entry 1: is no entry that this version knows")


async def test_a_folder_without_a_task_is_one_line(tmp_path_factory: pytest.TempPathFactory) -> None:
    site = Site.make(tmp_path_factory.mktemp("new"))
    for command in ("verify", "show"):
        result = await run(site, "audit", command)
        assert result.exit_code == 2
        assert "holds no rounds" in one_line(result)


@pytest.mark.parametrize("command", ["verify", "show", "trace"])
def test_help_teaches_with_an_example(command: str) -> None:
    result = CliRunner().invoke(cloud, ["audit", command, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.stdout
