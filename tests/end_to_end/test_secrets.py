"""No secret of either side stands in what is printed, logged, reported, or shown in a list of processes."""

from __future__ import annotations

import base64
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from cloud.keys import KEYS_FOLDER, load_keys
from edge_runtime.at_rest import StorageKey
from edge_runtime.device.home import Home
from edge_runtime.device.storage_key import default_file
from edge_runtime.wire import Token
from tests.end_to_end.test_task import COMMAND, Site, bert_site, wait_for

NAMES = ("one", "two")
_PAUSE_S = 0.02


@pytest.fixture
def site(bert_bundle: Path, tmp_path: Path) -> Site:
    return bert_site(tmp_path, bert_bundle)


@contextmanager
def command_lines() -> Iterator[set[str]]:
    """All that appear on this machine meanwhile; children of children too."""
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_PAUSE_S):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
                except OSError:  # it has just ended
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def round_keys(site: Site) -> set[bytes]:
    """Of the round that is open now."""
    path = f"file:{site.folder / 'server' / 'data' / 'emberlora.sqlite3'}?mode=ro"
    with closing(sqlite3.connect(path, uri=True)) as database:
        return {key for (key,) in database.execute("SELECT round_key FROM rounds WHERE round_key IS NOT NULL")}


def spellings(secret: bytes) -> set[str]:
    """How 32 bytes or a few may be printed."""
    return {
        secret.hex(),
        secret.hex().upper(),
        base64.b64encode(secret).decode().rstrip("="),
        base64.urlsafe_b64encode(secret).decode().rstrip("="),
        repr(secret)[2:-1],
    }


@pytest.mark.slow
def test_no_secret_is_printed_logged_reported_or_in_a_process_list(site: Site) -> None:
    """A whole task with a change of keys and a revocation, and every command that shows something of it."""
    secrets: set[bytes] = set()
    with command_lines() as seen, ExitStack() as stack:
        stack.enter_context(site.serve())
        site.wait_until_serving()
        for name in NAMES:
            site.enroll(name)
            secrets |= {key_of(site, name), storage_key_of(site, name).secret}
        secrets |= round_keys(site)
        said = [shown_by("edge", "rotate-key", "--home", site.folder / "one")]
        secrets.add(key_of(site, "one"))
        devices = [stack.enter_context(site.run(name)) for name in NAMES]
        while any(device.poll() is None for device in devices):
            secrets |= round_keys(site)
            time.sleep(_PAUSE_S)
        assert [device.returncode for device in devices] == [0, 0]
        config = ("--config", site.config)
        said += [shown_by("edge", "status", "--home", site.folder / "one", *more) for more in ((), ("--json",))]
        said.append(shown_by("cloud", "revoke", *config, "--device", "two"))
        for command in (("status",), ("devices",), ("audit", "show"), ("plans",), ("pilot",)):
            said += [shown_by("cloud", *command, *config, *more) for more in ((), ("--json",))]
        said += [shown_by("cloud", *command, *config) for command in (("audit", "verify"), ("replay",))]
        for page in ("plans", "pilot"):
            said.append(shown_by("cloud", page, *config, "--html", site.folder / f"{page}.html"))
        wait_for(lambda: any("edge_runtime.training.child" in line for line in seen), what="a child", logs=site.folder)
    keys = load_keys(site.folder / "server" / "data" / KEYS_FOLDER)
    secrets |= {key.private_bytes_raw() for key in (keys.plan, keys.operator)}
    secrets |= {bytes.fromhex(Token.parse(token).secret) for token in site.tokens}
    assert len(secrets) >= 3 + 2 + 3 + 2 + 2  # devices' keys, those of their disks, of the rounds, the server's, tokens

    logs = [path.read_text() for path in site.folder.glob("*.log")]
    pages = [path.read_text() for path in site.folder.rglob("*.html")]
    assert (len(logs), len(pages)) == (3, 2)
    shown = "\n".join([*said, *logs, *pages, *seen])
    forms = {form for secret in secrets for form in spellings(secret)} | set(site.tokens)
    assert "edge run" in shown
    assert [form for form in forms if form in shown] == []


def shown_by(*arguments: object) -> str:
    """What a command prints anywhere; the pilot's judgement may be no go, which is exit code 1."""
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 1), done.stderr
    assert done.stdout
    return done.stdout + done.stderr


def key_of(site: Site, name: str) -> bytes:
    return bytes.fromhex(Home(site.folder / name, storage_key_of(site, name)).identity().private_key)


def storage_key_of(site: Site, name: str) -> StorageKey:
    return StorageKey.parse(default_file(site.folder / name).read_text())


def test_the_search_finds_a_secret_in_every_spelling() -> None:
    secret = bytes(range(200, 232))
    for text in (secret.hex(), repr({"key": secret}), base64.b64encode(secret).decode(), f"{secret.hex().upper()}."):
        assert [form for form in spellings(secret) if form in text]
    assert shutil.which("ps") is None or Path("/proc/self/cmdline").exists()  # what is read is what ps shows
