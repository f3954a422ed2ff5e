"""The files by which a Raspberry Pi 4 says what it is.

qemu's user-mode emulation shows a program the host's ``/proc/cpuinfo`` and ``/sys/devices/system/cpu``, which are an
x86's, unless the root has files in their place. onnxruntime 1.28.0 and newer crash at import on a core that they do not
recognise and whose level 2 cache the system states all the same (``pytorch/cpuinfo``, pull requests 398 and 418);
1.27.0 and older only warn.
"""

from __future__ import annotations

from pathlib import Path

CORES = 4

_CPUINFO = """\
processor\t: {core}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""


def write(root: Path) -> None:
    """Put them into a root, where qemu finds them before the host's."""
    everyone = f"0-{CORES - 1}"
    files = {
        "proc/cpuinfo": "".join(_CPUINFO.format(core=core) for core in range(CORES)),
        "sys/devices/system/cpu/kernel_max": "255",
        "sys/devices/system/cpu/possible": everyone,
        "sys/devices/system/cpu/present": everyone,
    }
    for core in range(CORES):
        folder = f"sys/devices/system/cpu/cpu{core}"
        files |= {
            f"{folder}/cpufreq/cpuinfo_max_freq": "1500000",  # kHz
            f"{folder}/cpufreq/cpuinfo_min_freq": "600000",
            f"{folder}/topology/physical_package_id": "0",
            f"{folder}/topology/cluster_cpus_list": everyone,
            f"{folder}/topology/core_siblings_list": everyone,
        }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.rstrip("\n") + "\n")
