"""The time an export takes after the model is loaded, by stage: ``python -m bench.exporting MODEL OUT THREADS``.

In a process of its own, because torch and ONNX Runtime keep what they warmed up.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from unittest import mock

import msgspec

RANK = 8


class Stages(msgspec.Struct, frozen=True):
    """Seconds of each stage of one export."""

    graphs_s: float  # tracing and templates
    writing_s: float
    verifying_s: float  # against autograd, with torch's own forward and backward passes

    @property
    def total_s(self) -> float:
        """All of them."""
        return self.graphs_s + self.writing_s + self.verifying_s


def time_export(model: str, out: Path, threads: int) -> Stages:
    """Export a language model from a folder; loading is not timed."""
    import torch

    from export import ExportOptions, pipeline
    from export.sources import find_source, load

    torch.set_num_threads(threads)
    options = ExportOptions(model, "lm", out, rank=RANK, force=True)
    loaded = load(find_source(model), "lm", 0)
    seen: dict[str, float] = {}

    def progress(line: str) -> None:
        seen.setdefault(line.split(maxsplit=1)[0], time.perf_counter())

    with mock.patch.object(pipeline, "load", return_value=loaded):
        pipeline.run(options, progress)
    begin, *ends = (seen[word] for word in ("loading", "writing", "verifying", "verified:"))
    graphs, writing, verifying = (
        round(after - before, 3) for before, after in zip((begin, *ends[:-1]), ends, strict=True)
    )
    return Stages(graphs, writing, verifying)


if __name__ == "__main__":
    stages = time_export(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(msgspec.json.encode(stages).decode() + "\n")
