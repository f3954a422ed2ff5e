"""What the system tells of power, temperature and memory, by psutil: the only module that imports it, when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from edge_runtime.device.eligibility import Conditions

# Sensors of processors by the names of Linux drivers: Intel, AMD, ARM boards, and what firmware tells.
_PROCESSORS = ("coretemp", "k10temp", "zenpower", "cpu", "soc", "bcm2835", "acpitz")


class Reading(Protocol):
    """What psutil has of one sensor."""

    @property
    def current(self) -> float:
        """°C."""


def conditions() -> Conditions:
    """What is the case now."""
    import psutil  # a device without rules does without

    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    readings = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}  # not on macOS
    return Conditions(
        on_power=True if battery is None else battery.power_plugged,
        temperature_c=hottest(readings),
        free_mb=psutil.virtual_memory().available >> 20,
    )


def hottest(readings: Mapping[str, Sequence[Reading]]) -> float | None:
    """The highest temperature of a processor in °C, or of anything where no sensor is called one; None without any.

    Args:
        readings: Sensors by the name of their driver. What is not above 0 °C is a sensor without a reading.
    """
    told = {name: [r.current for r in some if r.current and r.current > 0] for name, some in readings.items()}
    processors = [value for name, values in told.items() if name.lower().startswith(_PROCESSORS) for value in values]
    found = processors or [value for values in told.values() for value in values]
    return max(found) if found else None
