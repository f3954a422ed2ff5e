"""The parent's side of a contestant: its process, and what it answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from bench.errors import UnavailableError
from bench.inside import Inside
from bench.models import last_line
from bench.systems import Setup

_NUMPY_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # set on some machines; they would handicap numpy


class Contestant:
    """A running system; end it by leaving its ``with`` block.

    Attributes:
        setup: What it was given.
        times: Milliseconds of every step so far.
        inside: Of the same steps, or empty for a system that does not tell.
        last: Its last answer, with the peaks of memory in MiB.
    """

    def __init__(self, setup: Setup, folder: Path) -> None:
        """Start it and wait until it is warm.

        Args:
            setup: What to run.
            folder: For its setup and what it says on stderr.

        Raises:
            UnavailableError: it cannot be run here, or it ended.
        """
        self.setup = setup
        self.times: list[float] = []
        self.inside: list[Inside] = []
        self.last: dict[str, Any] = {}
        stem = Path(setup.gradients).with_suffix("").name
        path = folder / f"{stem}.json"
        path.write_bytes(msgspec.json.encode(setup))
        self._errors = folder / f"{stem}.log"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [setup.python or sys.executable, "-W", "ignore", "-m", "bench.contestant", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={name: value for name, value in os.environ.items() if name not in _NUMPY_SETTINGS},
            )
        try:
            self._answer()
        except BaseException:  # an interrupt while it warms up must not leave it behind
            self.close()
            raise

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def run(self, steps: int) -> None:
        """Take some steps and remember their times.

        Raises:
            UnavailableError: the process ended.
        """
        assert self._process.stdin is not None  # it was opened as a pipe
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.last = self._answer()
        self.times += self.last["step_ms"]
        self.inside += msgspec.convert(self.last["inside"], list[Inside])

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    @property
    def median_ms(self) -> float:
        """Of all steps so far."""
        return float(np.median(self.times))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None  # both were opened as pipes
            pipe.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # it was opened as a pipe
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            reason = last_line(self._errors.read_text(errors="replace"))
            raise UnavailableError(f"{self.setup.system}: {self.setup.setting}: ended: {reason}")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise UnavailableError(str(answer["refused"]))
        return answer
