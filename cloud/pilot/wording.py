"""Findings in the words and units that terminal and page share."""

from __future__ import annotations

from cloud.console import size
from cloud.pilot.findings import DeviceFinding, Findings, Month
from cloud.pilot.grades import LIMITS, Grade

FIGURES = ("up", "down", "round trip", "step", "work", "rounds")
HEAD = ("device", "grade", *LIMITS, *FIGURES)  # of a table of devices


def verdict(found: Findings) -> str:
    """In one line."""
    failed = [reason.about for reason in found.reasons if reason.passed is False]
    if found.go:
        return f"{found.task}: GO, after {found.rounds} rounds with {len(found.devices)} devices"
    return f"{found.task}: NO-GO: {', '.join(failed)}"


def graded(device: DeviceFinding) -> list[tuple[Grade, str]]:
    """Letter of each limit, and the letter with its share."""
    pairs = [(getattr(device.grades, name), getattr(device.shares, name)) for name in LIMITS]
    return [(letter, letter if share is None else f"{letter} {share:.0%}") for letter, share in pairs]


def figures(device: DeviceFinding) -> list[str]:
    """What stands under :data:`FIGURES`."""
    return [
        _mbit(device.up_bytes_s),
        _mbit(device.down_bytes_s),
        _seconds(device.round_trip_s),
        _seconds(device.step_s),
        _seconds(device.train_s),
        str(device.counted),
    ]


def month_lines(month: Month) -> list[str]:
    """A heading, a line for a device, a line for the server."""
    return [
        f"A month of {month.rounds:,.0f} rounds, if they go on all the time",
        f"a device: {_amount(month.device_up)} up, {_amount(month.device_down)} down, and {size(month.bundle)} once; "
        f"{_hours(month.hours_median)} of work, {_hours(month.hours_slowest)} on the slowest",
        f"the server: {_amount(month.server_up)} received, {_amount(month.server_down)} sent",
    ]


def _mbit(bytes_s: float | None) -> str:
    return "–" if bytes_s is None else f"{bytes_s * 8 / 1e6:,.3g} Mbit/s"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3g} s" if value < 1000 else f"{value:,.0f} s"


def _amount(count: float | None) -> str:
    return "–" if count is None else size(count)


def _hours(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f} h"
