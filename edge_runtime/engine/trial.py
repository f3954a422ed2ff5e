"""``python -m edge_runtime.engine.trial``: one product through the engine's own session, right or not, and how fast.

A process of its own, because what it looks for ends a process: an instruction that the processor does not have.
Ends with 0 when the product is right; otherwise with 1 and a line on standard error, or by a signal.

Then it times the calibration pass and prints ``{"calibration_s": …}``: a device may not have a bundle yet, so this is a
piece of work that is the same everywhere, two float32 products of (512, 384) by (384, 1536) and (512, 1536) by
(1536, 384), which is what a feed-forward layer of MiniLM takes for 512 tokens. It is no training step, and says little
about memory speed or int8; it is there to compare devices that have not trained yet.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Protocol

import numpy as np

from edge_runtime.engine.runtime import open_session

# c = MatMul(a, b), float32, (m, k) (k, n) -> (m, n), operator set 20, IR version 9; nothing here can write ONNX files
# without a package that a device need not have.
MODEL = bytes.fromhex(
    "08093a5b0a110a01610a016212016322064d61744d756c1201675a150a016112100a0e0801120a0a0312016d0a0312016b5a150a01621210"
    "0a0e0801120a0a0312016b0a0312016e62150a016312100a0e0801120a0a0312016d0a0312016e42040a001014"
)
ROWS, WIDTH, INNER = 512, 384, 1536  # of the calibration pass
PASSES, ENOUGH_S = 5, 5.0
SHAPE = (67, 129, 65)  # m, k, n: no multiple of any vector's length, so that the kernels' ends run as well


class Session(Protocol):
    """What is used of ONNX Runtime's."""

    def run(self, names: None, feed: dict[str, Any]) -> list[Any]:
        """All outputs."""


def product_error(session: Session) -> float:
    """Largest error of the product of two random matrices, relative to its largest entry; about 1e-7 is right."""
    m, k, n = SHAPE
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), dtype=np.float32), rng.standard_normal((k, n), dtype=np.float32)
    wanted = a.astype(np.float64) @ b.astype(np.float64)
    found = session.run(None, {"a": a, "b": b})[0]
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def calibration_s(session: Session) -> float:
    """Median seconds of a pass after one to warm up; a slow machine makes fewer than five."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
    up = rng.standard_normal((WIDTH, INNER), dtype=np.float32)
    down = rng.standard_normal((INNER, WIDTH), dtype=np.float32)
    times: list[float] = []
    for _ in range(1 + PASSES):
        began = time.perf_counter()
        inner = session.run(None, {"a": x, "b": up})[0]
        session.run(None, {"a": inner, "b": down})
        times.append(time.perf_counter() - began)
        if len(times) > 1 and sum(times) > ENOUGH_S:
            break
    return float(np.median(times[1:]))


def main() -> int:
    """Compute, and say what is wrong, or how long the calibration pass takes."""
    session = open_session(MODEL)
    error = product_error(session)
    if error < 1e-5:  # False for NaN too
        sys.stdout.write(json.dumps({"calibration_s": calibration_s(session)}) + "\n")
        return 0
    sys.stderr.write(f"a product of two matrices is off by {error:.1e} of its largest entry\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
