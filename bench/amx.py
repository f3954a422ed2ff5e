"""Keeping a process from using AMX, the matrix tiles of recent Xeons, so that a result without them can be shown.

A process must ask Linux for the tiles before it may use them (arch_prctl, ARCH_REQ_XCOMP_PERM), and every library does:
oneDNN below PyTorch, which would have an environment variable as well, and ONNX Runtime's MLAS, which has none. A
seccomp filter that refuses this one request turns them off in both, for the life of the process.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from pathlib import Path

from bench.errors import UnavailableError

_ARCH_PRCTL, _REQUEST_PERMISSION = 158, 0x1023  # x86-64 only
_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # classic BPF
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_AUDIT_X86_64 = 0xC000003E
# seccomp_data: number at 0, architecture at 4, the first argument's low half at 16.
_PROGRAM = (
    (_LOAD, 0, 0, 4),
    (_JUMP_IF_EQUAL, 0, 5, _AUDIT_X86_64),
    (_LOAD, 0, 0, 0),
    (_JUMP_IF_EQUAL, 0, 3, _ARCH_PRCTL),
    (_LOAD, 0, 0, 16),
    (_JUMP_IF_EQUAL, 0, 1, _REQUEST_PERMISSION),
    (_RETURN, 0, 0, _REFUSE),
    (_RETURN, 0, 0, _ALLOW),
)


def has_amx() -> bool:
    """Whether the processor has the tiles."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "amx_tile" in info.read_text()


def forbid_amx() -> None:
    """Refuse the tiles to this process and its children from now on; call it before any library asks for them.

    Raises:
        UnavailableError: not on this system.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise UnavailableError("AMX off: needs Linux on x86-64")
    code = b"".join(struct.pack("HBBI", *line) for line in _PROGRAM)
    held = ctypes.create_string_buffer(code, len(code))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(_PROGRAM), ctypes.addressof(held)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or prctl(_SET_SECCOMP, _FILTER, head, 0, 0):
        raise UnavailableError(f"AMX off: this system takes no filter: {errno.errorcode.get(ctypes.get_errno(), '?')}")
