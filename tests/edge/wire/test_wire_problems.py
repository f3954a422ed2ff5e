"""Every error class has one row, and crosses the wire as itself."""

from __future__ import annotations

import json

import pytest

from edge_runtime.wire import (
    NotFoundError,
    RequestFormatError,
    RoundClosedError,
    TokenError,
    UnavailableError,
    WireError,
    decode_problem,
    encode_problem,
    problem_for,
)
from edge_runtime.wire.problems import PROBLEMS


def concrete(error: type[WireError]) -> set[type[WireError]]:
    """The classes without subclasses below ``error``."""
    below = error.__subclasses__()
    return set().union(*map(concrete, below)) if below else {error}


def test_the_table_is_exhaustive() -> None:
    assert set(PROBLEMS) == concrete(WireError)
    names = [problem.name for problem in PROBLEMS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("error", PROBLEMS, ids=lambda error: error.__name__)
def test_crosses_the_wire(error: type[WireError]) -> None:
    problem = problem_for(error())
    data = encode_problem(error("update pi-4: “expected” é"))
    document = json.loads(data)
    assert document["status"] == problem.status
    assert document.get("retry_after_s") == problem.retry_s
    assert document["title"]
    decoded = decode_problem(data, status=problem.status)
    assert type(decoded) is error
    assert str(decoded) == "update pi-4: “expected” é"


def test_unknown_members_are_ignored() -> None:
    data = json.dumps({"type": "urn:emberlora:problem:token", "instance": "/x", "more": [1]}).encode()
    assert type(decode_problem(data, status=403)) is TokenError


def test_undecodable_path_does_not_break_the_answer() -> None:
    data = encode_problem(NotFoundError("no such resource: /v1/\udc80"))
    assert str(decode_problem(data, status=404)) == "no such resource: /v1/?"


GARBAGE = [
    b"",
    b"<html>502 Bad Gateway</html>",
    b"null",
    b"{}",
    b'{"type":5}',
    b'{"type":"about:blank"}',
    b'{"type":"token"}',  # without the prefix it is not ours
    b'{"type":"urn:emberlora:problem:"}',
    b'{"type":"urn:emberlora:problem:no-such"}',
    b'{"type":"urn:emberlora:problem:token","status":"403"}',
    b'{"type":"urn:emberlora:problem:token","detail":"\xff"}',
    b'{"type":"urn:emberlora:problem:token","x":' + b"[" * 60_000,
    b"\xff\xfe\0",
    b'{"type":"urn:emberlora:problem:token","detail":"' + b"x" * 70_000 + b'"}',
]


@pytest.mark.parametrize("body", GARBAGE, ids=lambda body: repr(body[:50]))
@pytest.mark.parametrize(
    ("status", "error"),
    [(429, UnavailableError), (500, UnavailableError), (503, UnavailableError), (400, RequestFormatError)],
)
def test_garbage_becomes_what_its_status_says(body: bytes, status: int, error: type[WireError]) -> None:
    decoded = decode_problem(body, status=status)
    assert type(decoded) is error
    assert str(status) in str(decoded)
    assert len(str(decoded)) < 300


def test_the_document_counts_more_than_the_status() -> None:
    assert type(decode_problem(encode_problem(RoundClosedError("x")), status=500)) is RoundClosedError
