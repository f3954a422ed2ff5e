"""``python -m edge_runtime.engine.trial``: one product through the engine's own session, right or not.

A process of its own, because what it looks for ends a process: an instruction that the processor does not have.
Ends with 0 when the product is right; otherwise with 1 and a line on standard error, or by a signal.
"""

from __future__ import annotations

import sys

import numpy as np

from edge_runtime.engine.runtime import open_session

# c = MatMul(a, b), float32, (m, k) (k, n) -> (m, n), operator set 20, IR version 9; nothing here can write ONNX files
# without a package that a device need not have.
MODEL = bytes.fromhex(
    "08093a5b0a110a01610a016212016322064d61744d756c1201675a150a016112100a0e0801120a0a0312016d0a0312016b5a150a01621210"
    "0a0e0801120a0a0312016b0a0312016e62150a016312100a0e0801120a0a0312016d0a0312016e42040a001014"
)
SHAPE = (67, 129, 65)  # m, k, n: no multiple of any vector's length, so that the kernels' ends run as well


def product_error() -> float:
    """Largest error of the product of two random matrices, relative to its largest entry; about 1e-7 is right."""
    m, k, n = SHAPE
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), dtype=np.float32), rng.standard_normal((k, n), dtype=np.float32)
    wanted = a.astype(np.float64) @ b.astype(np.float64)
    found = open_session(MODEL).run(None, {"a": a, "b": b})[0]
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def main() -> int:
    """Compute, and say what is wrong."""
    error = product_error()
    if error < 1e-5:  # False for NaN too
        return 0
    sys.stderr.write(f"a product of two matrices is off by {error:.1e} of its largest entry\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
