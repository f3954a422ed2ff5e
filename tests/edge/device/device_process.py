"""``python device_process.py HOME …``: ``edge run --json`` as a process, with the stand-in as its training child."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from edge_runtime.device import commands, trainer

if __name__ == "__main__":
    standin = str(Path(__file__).with_name("device_standin.py"))
    trainer.ChildTrainer = functools.partial(trainer.ChildTrainer, (sys.executable, standin))  # type: ignore[misc]
    commands.run(args=["--home", sys.argv[1], "--json", *sys.argv[2:]])
