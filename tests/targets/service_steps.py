"""What is tried under systemd, step after step: each begins with what the one before has left.

The task has two devices a round. The first is the unit ``emberlora-edge``; while the second is not there its round
stays open, so that whatever is killed, stopped or upgraded can be seen to go on in the same round. Devices are pi-1,
which is revoked, pi-2, which takes its place in the same home, and pi-3, which comes last and lets the task end.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.certificates import Authority
from tests.targets.container import Container
from tests.targets.edge_tests import TargetError

ROUNDS = 3
LABELS = ("asyncio", "email", "tkinter", "xml")
CLOUD, EDGE = "emberlora-cloud", "emberlora-edge"
STATE = "/var/lib/emberlora"
HOME = f"{STATE}/home"  # of the device
PROGRAM = "/opt/emberlora/bin/emberlora"
AS_SERVICE = f"sudo -u emberlora EMBERLORA_HOME={HOME} {PROGRAM}"
CREDENTIAL = "emberlora.storage-key"
DROP_IN = "/etc/systemd/system/emberlora-edge.service.d"
STOP_LIMIT_S = 60  # TimeoutStopSec of both units


@dataclass
class Trial:
    """What the steps share."""

    container: Container
    blocks: list[str]  # of docs/operations.md
    newer: Path  # a wheel of a newer version
    authority: Authority | None = None

    def block(self, beginning: str) -> str:
        """The page's block with a line that begins so."""
        found = blocks_with(self.blocks, beginning)
        equal(len(found), 1, f"blocks of the page with a line that begins with {beginning!r}")
        return found[0]

    def admin(self, script: str, *, told: str = "") -> str:
        """Lines of the page, by somebody with sudo, in a folder with ``docs`` and ``bundle``."""
        return self.container.run(script, user="admin", cwd="/srv/admin", told=told)

    def short(self, script: str) -> str:
        """Lines that the page writes without ``sudo`` and paths, by root."""
        as_service = f'emberlora() {{ sudo -u emberlora {PROGRAM} "$@"; }}\n'
        return self.container.run(as_service + script, cwd=STATE)

    def token(self, device: str) -> str:
        """A token from the running server."""
        return self.short(f"emberlora cloud token --config server --device {device}").strip()

    def status(self) -> dict[str, Any]:
        """What the server says of the task."""
        return json.loads(self.short("emberlora cloud status --config server --json"))

    def position(self) -> tuple[int, int]:
        """The open round, and how many of its updates are counted."""
        status = self.status()
        return status["round"], status["received"]

    def start(self, unit: str) -> None:
        """Start a unit anew; without the reset, the trial's own starts would soon be too many for the device's."""
        self.container.run(f"systemctl reset-failed {unit} || true; systemctl start {unit}")

    def ended(self, unit: str, *, timeout_s: float = 90) -> dict[str, str]:
        """A unit's state once it is down for good."""
        show, down = self.container.show, ("inactive", "failed")
        self.container.until(lambda: show(unit)["ActiveState"] in down, f"{unit} to end", timeout_s)
        return show(unit)

    def stop(self, unit: str) -> dict[str, str]:
        """Stop a unit in good order."""
        began = time.monotonic()
        self.container.run(f"systemctl stop {unit}")
        assert time.monotonic() - began < STOP_LIMIT_S
        return self.container.show(unit)

    def serving(self) -> None:
        """Wait until the server answers."""
        as_service = f"cd {STATE} && sudo -u emberlora {PROGRAM} cloud status --config server"
        self.container.until(lambda: self.container.attempt(as_service).returncode == 0, "the server to answer")


def blocks_with(blocks: list[str], beginning: str) -> list[str]:
    """Those that have a line that begins so."""
    return [block for block in blocks if re.search(rf"(?m)^{re.escape(beginning)}", block)]


def equal(found: object, wanted: object, what: str) -> None:
    """Compare, and say what was compared: pytest, which would, is not here.

    Raises:
        TargetError: they differ.
    """
    if found != wanted:
        raise TargetError(f"{what}: expected {wanted!r}, got {found!r}")


def expect(found: dict[str, str], **wanted: str) -> None:
    """Compare a unit's properties with these."""
    equal({name: found[name] for name in wanted}, wanted, f"a unit ({found})")


def _examples(seed: int, count: int) -> str:
    """Training data whose labels are told by their words."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        label = rng.randrange(len(LABELS))
        words = " ".join(f"word{label * 10 + rng.randrange(10)}" for _ in range(6))
        lines.append(json.dumps({"text": words, "label": LABELS[label]}) + "\n")
    return "".join(lines)


def _certify(trial: Trial) -> None:
    """A certificate for the name that the page uses, where the config looks for it."""
    assert trial.authority is not None
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = trial.authority.issue(Path(folder), "ember.example", "127.0.0.1")
        for path in (certificate, key):
            trial.container.put(path, f"{STATE}/tls/{path.name}")
    trial.container.run(f"chown -R emberlora: {STATE}/tls; chmod 700 {STATE}/tls; chmod 600 {STATE}/tls/*")


def install_server(trial: Trial) -> None:
    """The page's block for the server, with the config edited before the unit starts."""
    block = trial.block("sudo useradd")
    before, start, after = block.partition("sudo systemctl daemon-reload")
    trial.admin(before)
    trial.authority = Authority()
    trial.container.write("/usr/local/share/ca-certificates/ember.crt", trial.authority.pem)
    trial.container.run("update-ca-certificates")
    _certify(trial)
    changes = {"rounds": str(ROUNDS), "devices_per_round": "2", "rank": "3", "max_tokens": "16"}
    changes |= {"# tls_cert": f'"{STATE}/tls/cert.pem"', "# tls_key": f'"{STATE}/tls/key.pem"'}
    edits = [f"s|^{key} = [^ ]*|{key.removeprefix('# ')} = {value}|" for key, value in changes.items()]
    edits.append("s|^epochs = 1 |steps = 600 |")
    trial.container.run(f"sed -i -e '{chr(10).join(edits)}' {STATE}/server/emberlora.toml")
    trial.admin(start + after)
    trial.serving()
    expect(trial.container.show(CLOUD), ActiveState="active", UnitFileState="enabled", NRestarts="0")
    events = trial.container.events(CLOUD)
    assert events[0]["event"] == "server-started", events
    assert trial.position() == (0, 0)


def install_device(trial: Trial) -> None:
    """The page's block for the device; the token comes on standard input."""
    trial.container.write("/srv/admin/mine.jsonl", _examples(seed=1, count=60))
    trial.container.write(f"{DROP_IN}/trial.conf", "[Service]\nRestartSec=1\n")  # five minutes are too long to wait
    enrol, start, rest = trial.block("export EMBERLORA_HOME").partition("sudo systemctl daemon-reload")
    trial.admin(enrol, told=trial.token("pi-1") + "\n")
    trial.admin(start + rest)
    trial.container.until(lambda: trial.position() == (0, 1), "pi-1's first update")
    expect(trial.container.show(EDGE), ActiveState="active", UnitFileState="enabled", NRestarts="0")
    names = [event["event"] for event in trial.container.events(EDGE)]
    assert "uploaded" in names, names


def shut_in(trial: Trial) -> None:
    """The sandbox is in force, and what the services wrote is for their user alone."""
    for unit in (CLOUD, EDGE):
        pid = trial.container.show(unit)["MainPID"]
        lines = trial.container.run(f"cat /proc/{pid}/status").splitlines()
        status = dict(re.split(r":\s*", line, maxsplit=1) for line in lines)
        wanted = {"NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0" * 16, "CapBnd": "0" * 16}
        equal({name: status[name] for name in wanted}, wanted, f"{unit}: its process")
        inside = f"nsenter --target={pid} --mount --"
        for place, mode in ((STATE, "rw"), ("/opt", "ro"), ("/etc", "ro"), ("/var/log", "ro")):
            options = trial.container.run(f"{inside} findmnt -no OPTIONS -T {place} | tail -1")
            equal(options.split(",")[0], mode, f"{unit}: {place}")
        equal(trial.container.run(f"{inside} ls -A /home"), "", f"{unit}: /home")
    equal(trial.container.run(f"stat -c '%a %U' {STATE}"), "700 emberlora\n", STATE)
    # Made by the administrator's commands, not by the units, and empty of secrets; nobody gets past the folder's mode.
    harmless = {f"{STATE}/server", f"{STATE}/server/emberlora.toml", f"{HOME}/lock"}
    shared = trial.container.run(f"find {STATE}/server {HOME} {HOME}.storage-key -perm /077").split()
    equal(set(shared) - harmless, set(), "files that others may read")
    equal(trial.container.run(f"find {STATE} -not -user emberlora"), "", "files of another user")


def revoked(trial: Trial) -> None:
    """A revoked device ends with 1, is started five times in all, then stays down until somebody resets it."""
    trial.short("emberlora cloud revoke --config server --device pi-1")
    expect(trial.ended(EDGE), ActiveState="failed", Result="exit-code", ExecMainStatus="1", NRestarts="5")
    equal(trial.container.attempt(f"systemctl start {EDGE}").returncode, 1, "a start before reset-failed")
    trial.start(EDGE)
    expect(trial.ended(EDGE), ActiveState="failed", ExecMainStatus="1", NRestarts="5")
    assert "its key is refused for good" in trial.container.text(EDGE)


def not_enrolled(trial: Trial) -> None:
    """After ``edge leave`` the unit ends with 2 and is not started again; another name makes it whole."""
    trial.admin(f"cd / && {AS_SERVICE} edge leave")
    trial.start(EDGE)
    expect(trial.ended(EDGE), ActiveState="failed", Result="exit-code", ExecMainStatus="2", NRestarts="0")
    enrol = trial.block("export EMBERLORA_HOME").partition("sudo systemctl daemon-reload")[0]
    trial.admin(enrol.replace("pi-1", "pi-2"), told=trial.token("pi-2") + "\n")


def killed(trial: Trial) -> None:
    """``kill -9`` of the device while it has a plan, then of the server: both come back, in the same round."""
    container, began = trial.container, len(trial.container.events(EDGE))
    trial.start(EDGE)
    container.until(lambda: "plan" in _names(trial, began), "pi-2 to have its plan")
    container.run(f"systemctl kill -s KILL {EDGE}")
    container.until(lambda: container.show(EDGE)["NRestarts"] == "1", "the device's second start")
    container.until(lambda: trial.position() == (1, 1), "pi-2's second update")
    container.run(f"systemctl kill -s KILL {CLOUD}")
    container.until(lambda: container.show(CLOUD)["NRestarts"] == "1", "the server's second start")
    trial.serving()
    equal(trial.position(), (1, 1), "round and updates after the kill")
    expect(container.show(EDGE), ActiveState="active", NRestarts="1")


def _names(trial: Trial, began: int) -> list[str]:
    return [event["event"] for event in trial.container.events(EDGE)[began:]]


def stopped(trial: Trial) -> None:
    """Both end in time: the device with 143, which is success, the server with 0; nothing is started again."""
    expect(trial.stop(EDGE), ActiveState="inactive", Result="success", ExecMainStatus="143")
    expect(trial.stop(CLOUD), ActiveState="inactive", Result="success", ExecMainStatus="0")
    for unit in (CLOUD, EDGE):
        trial.start(unit)
    trial.serving()
    equal(trial.position(), (1, 1), "round and updates after the stop")


def address_taken(trial: Trial) -> None:
    """A server whose port another program has: 2, and down."""
    trial.stop(CLOUD)
    trial.container.run("systemd-run --unit=squatter python3 -m http.server 8440 --bind 127.0.0.1")
    taken = "python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 8440))'"
    trial.container.until(lambda: trial.container.attempt(taken).returncode == 0, "the squatter to listen")
    trial.start(CLOUD)
    expect(trial.ended(CLOUD), ActiveState="failed", Result="exit-code", ExecMainStatus="2", NRestarts="0")
    trial.container.run("systemctl stop squatter")
    trial.start(CLOUD)
    trial.serving()


def other_certificate(trial: Trial) -> None:
    """A key of another certificate: 2, and down. The new pair from the same CA: the device notices nothing."""
    container = trial.container
    container.run(f"cp -a {STATE}/tls/key.pem {STATE}/old.pem")
    _certify(trial)
    container.run(f"cp -a {STATE}/tls/key.pem {STATE}/new.pem; cp -a {STATE}/old.pem {STATE}/tls/key.pem")
    container.run(f"systemctl restart {CLOUD}")
    expect(trial.ended(CLOUD), ActiveState="failed", Result="exit-code", ExecMainStatus="2", NRestarts="0")
    container.run(f"cp -a {STATE}/new.pem {STATE}/tls/key.pem; rm {STATE}/*.pem")
    began = len(container.events(EDGE))
    trial.start(CLOUD)
    trial.serving()
    container.run(f"systemctl restart {EDGE}")
    container.until(lambda: "started" in _names(trial, began), "the device to start")
    equal(trial.position(), (1, 1), "round and updates with another certificate")
    expect(container.show(EDGE), ActiveState="active")


def key_as_credential(trial: Trial) -> None:
    """An enrolled device's key moves from its file into a credential that systemd decrypts."""
    container, file = trial.container, f"{HOME}.storage-key"
    line = trial.block("openssl rand -hex 32").replace("openssl rand -hex 32", f"sudo cat {file}")
    trial.admin(line)
    unit = container.run(f"grep '^#LoadCredentialEncrypted' /etc/systemd/system/{EDGE}.service").lstrip("#")
    container.write(f"{DROP_IN}/key.conf", f"[Service]\n{unit}")
    container.run("systemctl daemon-reload")
    began = len(container.events(EDGE))
    trial.stop(EDGE)
    trial.start(EDGE)
    container.until(lambda: "started" in _names(trial, began), "the device to start")
    assert CREDENTIAL in _storage_key(trial), _storage_key(trial)
    container.run(f"rm {file}; systemctl restart {EDGE}")
    container.until(lambda: _names(trial, began).count("started") == 2, "the device to start without the file")
    expect(container.show(EDGE), ActiveState="active")
    trial.stop(EDGE)
    done = container.attempt(f"cd / && {AS_SERVICE} edge run")
    equal((done.returncode, "no storage key there" in done.stderr), (2, True), f"without the credential: {done.stderr}")
    trial.start(EDGE)


def _storage_key(trial: Trial) -> str:
    return str(json.loads(trial.admin(f"cd / && {AS_SERVICE} edge status --json"))["storage_key"])


def upgraded(trial: Trial) -> None:
    """The page's block for an upgrade, to a wheel of a newer version; the task goes on in its round."""
    trial.container.put(trial.newer, f"/srv/wheels/{trial.newer.name}")
    trial.short(trial.block("emberlora cloud backup --config server --out before-upgrade"))
    trial.serving()
    version = trial.container.run("/opt/emberlora/bin/pip show emberlora | grep ^Version")
    assert version.strip().endswith("+trial"), version
    equal(trial.position(), (1, 1), "round and updates after the upgrade")
    trial.container.run(f"systemctl restart {EDGE}")


def restored(trial: Trial) -> None:
    """The page's lines for backup and restore, with the unit in place of the command."""
    trial.short(trial.block("emberlora cloud backup --config server --out backup"))
    trial.stop(CLOUD)
    copy, _, verify = trial.block("cp -a backup server").partition("emberlora cloud serve --config server\n")
    trial.container.run(f"mv {STATE}/server {STATE}/lost")
    trial.short(copy)
    trial.start(CLOUD)
    trial.serving()
    trial.short(verify)
    equal(trial.position(), (1, 1), "round and updates after the restore")


def finished(trial: Trial) -> None:
    """A second device, enrolled with a credential of its own, lets the task end: 0 on both, and no further start."""
    container, key = trial.container, "/etc/credstore.encrypted/pi-3"
    container.write(f"{STATE}/pi-3.jsonl", _examples(seed=3, count=60))
    container.run(f"chown emberlora: {STATE}/pi-3.jsonl")
    container.run(f"openssl rand -hex 32 | systemd-creds encrypt --name={CREDENTIAL} - {key}")
    load = f"--uid=emberlora -p LoadCredentialEncrypted={CREDENTIAL}:{key} -E EMBERLORA_HOME={STATE}/pi-3"
    enrol = f"edge enroll --server https://ember.example:8440 --token - --name pi-3 --data {STATE}/pi-3.jsonl"
    container.run(f"systemd-run --pipe --wait {load} {PROGRAM} {enrol}", told=trial.token("pi-3") + "\n")
    equal(container.attempt(f"ls {STATE}/pi-3.storage-key").returncode, 2, "no key file beside the home")
    container.run(f"systemd-run --unit=pi-3 --remain-after-exit {load} {PROGRAM} edge run --json")
    expect(trial.ended(EDGE), ActiveState="inactive", Result="success", ExecMainStatus="0", NRestarts="0")
    container.until(lambda: container.show("pi-3")["SubState"] == "exited", "pi-3 to end")
    expect(container.show("pi-3"), Result="success", ExecMainStatus="0")
    status = trial.status()
    equal((status["state"], status["round"]), ("finished", ROUNDS), "the task")
    trial.short("emberlora cloud audit verify --config server")
    expect(trial.stop(CLOUD), ActiveState="inactive", Result="success", ExecMainStatus="0", NRestarts="0")


STEPS: list[tuple[str, Callable[[Trial], None]]] = [
    ("the server is installed", install_server),
    ("a device is installed", install_device),
    ("both are shut in", shut_in),
    ("a revoked device stays down after five starts", revoked),
    ("a device that is not enrolled stays down", not_enrolled),
    ("kill -9 of both", killed),
    ("systemctl stop of both", stopped),
    ("an address that is taken", address_taken),
    ("a wrong and a new certificate", other_certificate),
    ("the device's key as a credential", key_as_credential),
    ("an upgrade", upgraded),
    ("backup and restore", restored),
    ("the task ends", finished),
]
