"""Hostile inputs by the thousand, and the proof that the fuzzer sees what it looks for."""

from __future__ import annotations

import asyncio
import logging
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.wire import UpdateFormatError
from tests.fuzz.http import HttpTarget, http_faults
from tests.fuzz.mutations import mutated, shortest
from tests.fuzz.parsers import Parser, fault, make_parsers
from tests.fuzz.soak import HTTP, little_room, parser_faults, slices_of

ROOT = Path(__file__).parents[2]
NAMES = [parser.name for parser in make_parsers()]


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parser]:
    return {parser.name: parser for parser in make_parsers(tmp_path_factory.mktemp("parsers"))}


@pytest.mark.parametrize("name", NAMES)
def test_good_samples_are_read(parsers: dict[str, Parser], name: str) -> None:
    """Otherwise every change of them would be refused at the first byte, and nothing behind it tried."""
    if name == "problem":  # an answer's document is read into an error, whatever it is
        return
    for sample in parsers[name].corpus:
        parsers[name].read(sample)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_bytes_are_read_lawfully_or_refused_by_name(parsers: dict[str, Parser], name: str) -> None:
    assert parser_faults(parsers[name], range(400)) == []


def test_hostile_requests_are_answered_by_name(tmp_path: Path) -> None:
    assert asyncio.run(http_faults(tmp_path, range(300))) == []


def test_a_soak_in_bounded_memory_finds_nothing() -> None:
    """Seeds of its own, so that it tries others than the tests above."""
    command = [sys.executable, "-m", "tests.fuzz.soak", "--count", "3000", "--seed", "1000", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout


def _reads_a_length(data: bytes) -> None:
    if len(data) < 12 or data[:4] != b"GOOD":
        raise UpdateFormatError("update: magic")
    (count,) = struct.unpack_from("<Q", data, 4)
    data[12 + count]  # it believes what it read


def test_a_parser_that_believes_a_length_is_found_with_its_shortest_bytes() -> None:
    naive = Parser("naive", (b"GOOD" + struct.pack("<Q", 3) + b"abcd",), _reads_a_length, UpdateFormatError)
    found = parser_faults(naive, range(300))
    assert found
    assert "IndexError" in "".join(found)
    assert "b'GOOD" in found[0]


def test_a_parser_that_allocates_what_it_is_told_is_found() -> None:
    greedy = Parser("greedy", (b"",), lambda data: bytearray(len(data) << 30).clear(), UpdateFormatError)
    with little_room():
        assert "MemoryError" in str(fault(greedy, b"x"))
        assert fault(greedy, b"") is None


def test_an_unreadable_or_endless_message_is_a_fault() -> None:
    def refuse(data: bytes) -> None:
        raise UpdateFormatError(data.decode("utf-8", "surrogateescape"))

    told = Parser("told", (b"",), refuse, UpdateFormatError)
    assert "cannot be written" in str(fault(told, b"\xff"))
    assert "5000 characters" in str(fault(told, b"a" * 5000))
    assert fault(told, b"magic") is None


def test_a_servers_fault_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody has named is answered with 503, so it is the log that gives it away."""

    async def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("cloud.service.Aggregator.tell", broken)
    found = asyncio.run(http_faults(tmp_path, range(400)))
    assert found
    assert all("logged by cloud.http" in text and "planted" in text for text in found)


def test_bytes_that_are_no_http_are_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever can connect could fill the disk with tracebacks and their own bytes."""

    async def send() -> bytes:
        async with HttpTarget(tmp_path) as target:
            host, _, port = target.url.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /v1/health HTTP/1.1\r\nHostz 127.0.0.1\r\n\r\n")
            answer = await reader.read()
            writer.close()
            return answer

    with caplog.at_level(logging.DEBUG):
        answer = asyncio.run(send())
    assert answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
    assert "Hostz" not in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_body_that_is_cut_off_is_no_fault_of_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def cut() -> None:
        async with HttpTarget(tmp_path) as target:
            host, _, port = target.url.removeprefix("http://").partition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/enrolments HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{")
            await writer.drain()
            await asyncio.sleep(0.05)  # the handler waits for the rest
            writer.transport.abort()
            await writer.wait_closed()
            assert await target.honest_fault() is None

    asyncio.run(cut())
    assert "failed" not in caplog.text


def test_the_same_number_is_the_same_input() -> None:
    corpus = (b'{"a":1}', b'{"b":[2]}')
    assert [mutated(random.Random(n), corpus) for n in range(50)] == [
        mutated(random.Random(n), corpus) for n in range(50)
    ]
    assert len({mutated(random.Random(n), corpus) for n in range(50)}) > 25


def test_shortest_keeps_what_fails() -> None:
    assert shortest(b"....ab..c...", lambda data: b"a" in data and b"c" in data) == b"ac"


def test_every_input_is_tried_once() -> None:
    pieces = slices_of(10_000, 5, ["a", "b"])
    assert sum(len(seeds) for name, seeds in pieces if name == HTTP) == 500
    for name in ("a", "b"):
        assert [seed for other, seeds in pieces if other == name for seed in seeds] == list(range(5, 5 + 4_750))
