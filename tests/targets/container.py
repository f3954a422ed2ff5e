"""A Debian root that is booted with ``systemd-nspawn``: its own systemd, journal and network, the host's kernel."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.targets.edge_tests import TargetError

_ENVIRONMENT = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8")
_BOOT_S, _STOP_S, _COMMAND_S = 60, 60, 300


class Container:
    """A booted root; a context manager that halts it at the end.

    Commands run in all of its namespaces, started by ``nsenter``: that needs neither machined nor a login, so it works
    on hosts that do not run systemd themselves.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._root = root
        self._name = name
        self._log = root.with_name(f"{root.name}.log")
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def __enter__(self) -> Container:
        # A host with systemd gives the container a scope; elsewhere it stays in the cgroup that it was started in.
        alone = () if Path("/run/systemd/system").is_dir() else ("--keep-unit",)
        command = ["systemd-nspawn", "--boot", f"--directory={self._root}", f"--machine={self._name}", "--register=no"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *alone, "--private-network", "--console=pipe"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self.until(self._booted, "the container to boot", _BOOT_S)
        except TargetError:
            self._halt()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._halt()

    def _booted(self) -> bool:
        assert self._process is not None  # it was started before anything is asked of it
        if self._process.poll() is not None:
            raise TargetError(f"systemd-nspawn: {self._log.read_text(errors='replace').strip()[-500:]}")
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self._leader = int(children[0]) if children else 0
        return self._leader > 0 and self.attempt("systemctl is-system-running").stdout.strip() in (
            "running",
            "degraded",
        )

    def _halt(self) -> None:
        if self._process is None:
            return
        if self._leader and self._process.poll() is None:
            self.attempt("systemctl --no-block poweroff")
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def attempt(
        self, script: str, *, user: str = "root", cwd: str = "/", told: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """A shell script in the container, as it ends.

        Args:
            script: Lines for bash; it stops at the first that fails.
            user: Whose shell.
            cwd: Folder that it begins in.
            told: Its standard input.
        """
        shell = ["bash", "-euo", "pipefail", "-c", script]
        become = [] if user == "root" else ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        enter = ["nsenter", f"--target={self._leader}", "--all", "--", "env", "-i", f"--chdir={cwd}", *_ENVIRONMENT]
        return subprocess.run([*enter, *become, *shell], input=told, capture_output=True, text=True, timeout=_COMMAND_S)

    def run(self, script: str, *, user: str = "root", cwd: str = "/", told: str = "") -> str:
        """What a script said on standard output.

        Raises:
            TargetError: it failed.
        """
        done = self.attempt(script, user=user, cwd=cwd, told=told)
        if done.returncode:
            raise TargetError(f"{script}\nended with {done.returncode}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
        return done.stdout

    def show(self, unit: str) -> dict[str, str]:
        """What systemd says of a unit."""
        names = "ActiveState,SubState,Result,ExecMainCode,ExecMainStatus,NRestarts,MainPID,UnitFileState"
        return dict(line.partition("=")[::2] for line in self.run(f"systemctl show -p {names} {unit}").splitlines())

    def events(self, unit: str) -> list[dict[str, Any]]:
        """The JSON lines of a unit in the journal."""
        lines = self.run(f"journalctl --sync; journalctl -u {unit} -o cat --no-pager").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def text(self, unit: str) -> str:
        """The end of a unit's journal, for people."""
        return self.run(f"journalctl -u {unit} -o short-precise --no-pager -n 25")

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 90) -> None:
        """Wait for something.

        Raises:
            TargetError: it did not come.
        """
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                raise TargetError(f"waited {timeout_s:.0f} s for {what}")
            time.sleep(0.25)

    def put(self, source: Path, place: str) -> None:
        """Copy a file or folder of the host to a path in the container; it is root's there."""
        target = self._root / place.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, target)

    def write(self, place: str, text: str) -> None:
        """Write a file in the container."""
        target = self._root / place.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
