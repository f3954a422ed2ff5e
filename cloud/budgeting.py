"""Settling a config's budget in bytes: its shares, and "auto", become what they mean with the task's bundle.

``upload`` or ``download`` "auto" is the most precise of float32, int8 and int4, download at least as precise as upload,
with which every module could have rank 1 in the curve's last round; if there is none, upload is int4 and download int8.
A download in int4 and an upload in ternary codes have to be asked for: the first rounds what devices train from, the
second everything but a change's sign.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cloud.config import DOWNLOAD_BITS, UPLOAD_BITS, Config, Download, Upload
from cloud.errors import ConfigError
from cloud.planner import Traffic, afford
from cloud.planner.byte_budget import least_bytes
from edge_runtime.bundle import Manifest

_PRECISE_FIRST: tuple[Download, ...] = ("float32", "int8", "int4")
_WHOLE = 1 - 1e-9  # a component of every module, whatever is lost in the last digit


def with_budget(config: Config, manifest: Manifest) -> Config:
    """The config with shares that keep to its budget in bytes; as it is where there is none, or it has been settled.

    Raises:
        ConfigError: the budget is less than the least plans may cost.
    """
    settings, task = config.annealing, config.task
    if settings.bytes_per_device_per_round is not None:
        allowed = settings.bytes_per_device_per_round * task.rounds
    elif settings.total_bytes is not None:
        allowed = settings.total_bytes // task.devices_per_round
    else:
        return config
    fitting = None
    for upload, download in _ways(config):
        traffic = _traffic(config, manifest, upload, download)
        found = afford(settings, task.policy, traffic, rounds=task.rounds, allowed=allowed)
        if found is None:
            continue
        settled = msgspec.structs.replace(task, upload=upload, download=download)
        fitting = msgspec.structs.replace(config, task=settled, annealing=found.settings)
        if found.last_share * traffic.rank >= _WHOLE:
            break
    if fitting is None:
        raise ConfigError(_too_small(config, manifest))
    return fitting


def _ways(config: Config) -> Iterator[tuple[Upload, Download]]:
    """What upload and download may be, the most precise first; at least one way."""
    task = config.task
    uploads: tuple[Upload, ...] = _PRECISE_FIRST if task.upload == "auto" else (task.upload,)
    downloads = _PRECISE_FIRST if task.download == "auto" else (task.download,)
    automatic = "auto" in (task.upload, task.download)
    for upload in uploads:
        for download in downloads:
            coarser = DOWNLOAD_BITS[download] < UPLOAD_BITS[upload]
            if not automatic or not (coarser or (download == "int4" and task.download == "auto")):
                yield upload, download


def _traffic(config: Config, manifest: Manifest, upload: Upload, download: Download) -> Traffic:
    task = config.task
    return Traffic(
        manifest=manifest,
        task=task.name,
        aggregation=task.aggregation,
        rank=task.rank or manifest.r_max,
        head_trained=manifest.head.module is not None and task.shares_head,
        upload=UPLOAD_BITS[upload],
        download=DOWNLOAD_BITS[download],
        upload_density=1.0 if upload == "float32" else task.upload_density,
        tiers=config.tiers,
    )


def least_budget(config: Config, manifest: Manifest) -> int:
    """The least ``bytes_per_device_per_round`` that the config's policy can keep to."""
    return -(-_least(config, manifest)[0] // config.task.rounds)


def _least(config: Config, manifest: Manifest) -> tuple[int, tuple[Upload, Download]]:
    """The least bytes of one device in all training rounds, and the way of sending with which it takes no more."""
    task, settings = config.task, config.annealing
    return min(
        (least_bytes(settings, task.policy, _traffic(config, manifest, *way), task.rounds), way)
        for way in _ways(config)
    )


def _too_small(config: Config, manifest: Manifest) -> str:
    task, settings = config.task, config.annealing
    needed, (upload, download) = _least(config, manifest)
    per_device, total = settings.bytes_per_device_per_round, settings.total_bytes
    least = -(-needed // task.rounds) if total is None else needed * task.devices_per_round
    given = f"bytes_per_device_per_round ({per_device})" if total is None else f"total_bytes ({total})"
    return (
        f"annealing.{given} is too small for task.policy ({task.policy}): expected at least {least} "
        f"with task.upload {upload} and task.download {download}"
    )
