"""The operator's key is replaced while no server runs: the old one is refused, and an interruption costs nothing."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner, Result
from cloud_fleet import Device, Site

from cloud import audit, operator_key
from cloud.commands import cloud as command
from cloud.errors import ServerRefusedError
from cloud.keys import KEYS_FOLDER, NEXT_OPERATOR_KEY, OPERATOR_KEY, load_keys
from cloud.operator import OperatorClient
from cloud.store import Database, Identity
from edge_runtime import wire


@pytest.fixture
def began() -> int:
    return int(time.time())  # commands have the real clock


async def rotate(site: Site, *args: str) -> Result:
    """In a thread: a command has an event loop of its own."""
    return await asyncio.to_thread(
        CliRunner().invoke, command, ["rotate-operator-key", "--config", str(site.folder), *args]
    )


def keys_folder(site: Site) -> Path:
    return site.config.data_path / KEYS_FOLDER


def public(site: Site) -> str:
    return load_keys(keys_folder(site)).operator.public_key().public_bytes_raw().hex()


async def logged(site: Site) -> list[tuple[str, str]]:
    """Old and new of every change in the log, which must be whole; no server runs."""
    database = Database(site.config.data_path / "emberlora.sqlite3")
    try:
        found = await database.call(database.audited)
    finally:
        await database.close()
    assert audit.check_chain(found.links) is None
    assert audit.check_facts(found.links, found.facts) is None
    entries = [audit.decode_entry(link.text) for link in found.links]
    return [(one.old, one.new) for one in entries if isinstance(one, audit.OperatorKeyChanged)]


async def test_the_old_key_is_refused_and_commands_have_the_new_one(site: Site, session: aiohttp.ClientSession) -> None:
    """A device and a token of before know nothing of it."""
    one = await site.device(session, "one")
    token = wire.Token.parse((await site.operator.make_token("two", 900)).token)
    old_keys, old = load_keys(keys_folder(site)), public(site)
    await site.close()
    told = json.loads((await rotate(site, "--json")).stdout)
    assert told == {"old": old, "new": public(site), "resumed": False}
    assert sorted(path.name for path in keys_folder(site).iterdir()) == [OPERATOR_KEY, "plan.pem"]
    assert (keys_folder(site) / OPERATOR_KEY).stat().st_mode & 0o777 == 0o600
    assert await logged(site) == [(old, told["new"])]

    server = await site.start()
    thief = OperatorClient(server.url, old_keys, clock=site.clock, entropy=secrets.token_bytes)
    with pytest.raises(ServerRefusedError, match="the signature does not match"):
        await thief.stop()
    assert (await site.operator.status()).state == "training"
    assert await one.plan() is not None
    await Device(site, session, "two").enrol(token)


async def test_a_server_that_runs_is_stopped_first(site: Site) -> None:
    before = public(site)
    found = await rotate(site)
    assert found.exit_code == 2
    assert found.stderr.splitlines()[-1].endswith("another aggregator is using this data folder; stop it first")
    assert public(site) == before
    assert not (keys_folder(site) / NEXT_OPERATOR_KEY).exists()


async def test_a_task_that_was_never_started_has_nothing_to_note_it_in(tmp_path: Path) -> None:
    found = await rotate(Site.make(tmp_path))
    assert found.exit_code == 2
    assert "start the task with `emberlora cloud serve` first" in found.stderr


class _Killed(BaseException):
    """No handler of ours catches it."""


@pytest.mark.parametrize(
    ("what", "nth", "left"),
    [
        ("fsync", 0, "half a key"),
        ("fsync", 1, "the next key"),
        ("append", 0, "the next key"),
        ("replace", 0, "the next key, and its entry"),
        ("fsync", 2, "nothing to do"),
    ],
)
async def test_an_interrupted_change_is_finished_by_the_next_one(
    site: Site, monkeypatch: pytest.MonkeyPatch, what: str, nth: int, left: str
) -> None:
    """At every write. What the log says in the end is the key that is in force."""
    old = public(site)
    await site.close()
    owner: Any = {"fsync": os, "replace": Path, "append": audit}[what]
    name = {"append": "follow"}.get(what, what)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, _dying(getattr(owner, name), nth))
        with pytest.raises(_Killed):
            await operator_key.rotate(site.config, Identity("tiny", site.bundle.digest), now=site.clock.now)
    if left == "half a key":
        (keys_folder(site) / NEXT_OPERATOR_KEY).write_bytes(b"-----BEGIN")
    done = left == "nothing to do"
    assert await logged(site) == ([(old, public(site))] if done else []) or "entry" in left
    assert (public(site) == old) is not done

    finished = await rotate(site)
    assert finished.exit_code == 0, finished.output
    assert ("is finished now" in finished.stdout) is ("next key" in left)
    changes = await logged(site)
    assert [change[0] for change in changes] == [old, *(new for _, new in changes[:-1])]
    assert changes[-1][1] == public(site)
    assert len(changes) == (2 if done else 1)


def _dying(real: Callable[..., Any], nth: int) -> Callable[..., Any]:
    left = nth

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        if not left:
            raise _Killed
        left -= 1
        return real(*args, **kwargs)

    return call
