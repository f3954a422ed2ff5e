"""Threads of the aggregator share a heap, as glibc itself counts them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Twelve threads that hold memory at the same time; malloc_info(3) then lists every heap.
_CHILD = """
import ctypes, sys, threading
from cloud.heap import share_heap
if sys.argv[1] == "shared":
    assert share_heap()
together = threading.Barrier(12)
def work():
    kept = ctypes.CDLL(None).malloc(1000)
    together.wait()
threads = [threading.Thread(target=work) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
library = ctypes.CDLL(None)
library.fdopen.restype = ctypes.c_void_p
stream = ctypes.c_void_p(library.fdopen(1, b"w"))
library.malloc_info(0, stream)
library.fflush(stream)
"""


def _heaps(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", _CHILD, how], capture_output=True, text=True, check=True)
    return done.stdout.count("<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has heaps for threads")
def test_all_threads_share_one_heap() -> None:
    assert _heaps("shared") == 1 < _heaps("alone")
