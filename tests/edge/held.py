"""Training children as a device runs them: the job on standard input, which stays open until they have ended."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Sequence
from subprocess import PIPE

_TIMEOUT_S = 120


def run_held(command: Sequence[str], job: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run a child to its end; ``job`` is JSON in one line."""
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE) as child:
        assert child.stdin is not None, "a pipe was asked for"
        assert child.stdout is not None, "a pipe was asked for"
        assert child.stderr is not None, "a pipe was asked for"
        late = threading.Timer(_TIMEOUT_S, child.kill)
        late.start()
        child.stdin.write(job + b"\n")
        child.stdin.flush()
        said, errors = child.stdout.read(), child.stderr.read()
        code = child.wait()
        late.cancel()
    return subprocess.CompletedProcess(command, code, said, errors)
