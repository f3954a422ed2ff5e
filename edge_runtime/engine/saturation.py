"""Whether int8 products saturate on this processor.

The processors of the x86 family without VNNI add two products of an 8-bit activation and an 8-bit weight in 16 bits:
2 · 255 · 127 does not fit, and what is above is cut off without a word. With weights of 7 bits every sum fits. So the
engine computes one such product, once, and where it is wrong gives all weights a bit less.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from edge_runtime.engine.runtime import open_session

# c = DynamicQuantizeMatMul(a, b, s): float32 (m, k), int8 (k, n), float32 (n,) -> float32 (m, n); operator set 20 with
# version 1 of com.microsoft, IR version 9. Nothing on a device writes the files of domains.
MODEL = bytes.fromhex(
    "08093a8e010a320a01610a01620a0173120163221544796e616d69635175616e74697a654d61744d756c3a0d636f6d2e6d6963726f736f66"
    "741201675a150a016112100a0e0801120a0a0312016d0a0312016b5a150a016212100a0e0803120a0a0312016b0a0312016e5a100a017312"
    "0b0a09080112050a0312016e62150a016312100a0e0801120a0a0312016d0a0312016e42040a00101442110a0d636f6d2e6d6963726f736f"
    "66741001"
)
_SHAPE = (67, 129, 65)  # m, k, n: no multiple of any vector's length, so that the kernels' ends run as well
_TOLERANCE = 1e-3  # a saturated product is half of the right one


@cache
def saturates() -> bool:
    """Whether a product of the largest activations and weights is wrong; computed once in a process."""
    m, k, n = _SHAPE
    given = {"a": np.ones((m, k), np.float32), "b": np.full((k, n), 127, np.int8), "s": np.ones(n, np.float32)}
    found = open_session(MODEL).run(None, given)[0]
    return not bool((np.abs(found / (127 * k) - 1) < _TOLERANCE).all())
