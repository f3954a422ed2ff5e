"""What ``emberlora cloud devices`` prints: a line a device, from the data folder, whether or not the server runs."""

from __future__ import annotations

import time

import msgspec
from msgspec import UNSET, UnsetType

from cloud.config import Config
from cloud.console import columns, size
from cloud.kept import open_kept
from cloud.members import read_statuses
from edge_runtime.wire import DeviceStatus

_HEAD = ("device", "enrolled", "last seen", "rounds", "machine", "memory, free", "step", "link up, down", "up, down")


async def show_devices(config: Config, *, as_json: bool, now: float) -> list[str]:
    """The lines to print: a table, or with ``as_json`` a ``DeviceStatus`` a device. ``now`` is Unix seconds.

    Raises:
        DataError, BundleError: see :func:`cloud.kept.open_kept`.
    """
    async with open_kept(config) as (database, _):
        devices = await read_statuses(database)
    if as_json:
        return [msgspec.json.encode(device).decode() for device in devices]
    return list(columns([_HEAD, *(_cells(device, now) for device in devices)]))


def _cells(device: DeviceStatus, now: float) -> tuple[str, ...]:
    seen = "never" if device.last_seen is None else f"{_ago(now - device.last_seen)} ago"
    if device.left or device.revoked is not None:
        seen = "left" if device.revoked is None else "revoked"
    told = device.capability
    figures = ("–", "–", "–", "–")
    if told is not None:
        figures = (
            f"{told.machine}, {told.cores} core{'s' if told.cores > 1 else ''}",
            f"{told.memory_mb:,} MB, {told.available_mb:,}",
            "–" if told.step_s is UNSET else f"{told.step_s:.3g} s",
            f"{_mbit(told.up_bytes_s)}, {_mbit(told.down_bytes_s)}",
        )
    return (
        device.name,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(device.enrolled)),
        seen,
        str(device.updates),
        *figures,
        f"{size(device.bytes_up)}, {size(device.bytes_down)}",
    )


def _ago(seconds: float) -> str:
    seconds = max(seconds, 0.0)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _mbit(bytes_s: float | UnsetType) -> str:
    return "–" if bytes_s is UNSET else f"{bytes_s * 8 / 1e6:.3g} Mbit/s"
