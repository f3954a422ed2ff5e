"""What a reader of figures must know about the device they are from."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_BOARD = Path("/proc/device-tree/model")
_CPUINFO = Path("/proc/cpuinfo")


def describe_host(threads: int | None) -> dict[str, str | int | None]:
    """Device or processor, cores, threads (None: one a core), memory in MiB, system, Python and engine."""
    return {
        "device": device_name(_BOARD, _CPUINFO),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "onnxruntime": _installed("onnxruntime") or _installed("onnxruntime-training-cpu"),
    }


def device_name(board: Path, cpuinfo: Path) -> str:
    """The board's name as its device tree gives it, else the processor's.

    Args:
        board: ``/proc/device-tree/model``, which ARM boards have; text that ends with a zero byte.
        cpuinfo: ``/proc/cpuinfo``, which names the processor on x86 only.
    """
    if board.exists():
        return board.read_bytes().rstrip(b"\0").decode("utf-8", "replace").strip()
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
