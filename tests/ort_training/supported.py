"""Whether onnxruntime-training-cpu has a wheel for this interpreter; exit code 1 and the reason on stdout when not.

Run by the Makefile with the interpreter in question, so it uses nothing but the standard library.
"""

from __future__ import annotations

import platform
import sys


def reason(version: tuple[int, int], system: str, machine: str) -> str | None:
    """Why there is no wheel, or None when there is one."""
    if version > (3, 12):
        return f"onnxruntime-training-cpu ended with Python 3.12, this is {version[0]}.{version[1]}: set ORT_PYTHON"
    if (system, machine) == ("Linux", "x86_64") or system == "Darwin":
        return None
    return f"onnxruntime-training-cpu has no wheel for {system} {machine}"


if __name__ == "__main__":
    found = reason((sys.version_info[0], sys.version_info[1]), platform.system(), platform.machine())
    if found:
        print(found)  # noqa: T201 - the Makefile reads it
    sys.exit(1 if found else 0)
