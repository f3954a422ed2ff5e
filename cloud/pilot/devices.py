"""Each device of a pilot, from what was counted, what was timed, and what it measured of itself. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

from msgspec import UNSET, UnsetType

from cloud.pilot.findings import DeviceFinding
from cloud.pilot.grades import Shares, grade_device
from cloud.pilot.trial import Trial, TrialRound
from cloud.store import UpdateRecord
from edge_runtime import wire

LEAST_TIMED_BYTES = 64 << 10  # what comes in one piece out of buffers says nothing of a link


def device_findings(trial: Trial) -> tuple[DeviceFinding, ...]:
    """Every device that has not left, by name."""
    rounds = {round_.plan.round: round_ for round_ in trial.rounds if round_.applied and round_.plan.state == "train"}
    return tuple(
        _finding(trial, device, rounds) for device in trial.devices if not device.left and device.revoked is None
    )


def percentile(values: Iterable[float], part: float) -> float | None:
    """The smallest value that at least this part of the values does not exceed; None of none."""
    ordered = sorted(values)
    return ordered[max(math.ceil(part * len(ordered)) - 1, 0)] if ordered else None


def _finding(trial: Trial, device: wire.DeviceStatus, rounds: dict[int, TrialRound]) -> DeviceFinding:
    sent = [update for update in trial.updates if update.receipt.device == device.name]
    counted = [update for update in sent if update.receipt.round in rounds]
    refused = sum(trial.refusals.get(device.name, {}).values())
    up_bytes_s, up_by = _up_speed(trial, device, sent)
    told = device.capability
    down_bytes_s = _told(told.down_bytes_s) if told else None
    up_bytes = statistics.fmean(update.bytes for update in counted) if counted else None
    down_bytes = max(device.bytes_down - trial.bundle_bytes, 0) / len(sent) if sent else None
    transfer_s = _transfer_s((up_bytes, up_bytes_s), (down_bytes, down_bytes_s))
    peak_mb = max((u.metrics.peak_private_mb for u in counted if u.metrics.peak_private_mb is not None), default=None)
    answer_s = percentile(_answers(device, counted, rounds), 0.9)
    train_s = _median(update.metrics.seconds for update in counted)
    deadline_s = trial.config.task.round_deadline_s
    shares = Shares(
        memory=peak_mb / told.available_mb if told and told.available_mb and peak_mb is not None else None,
        time=None if answer_s is None else answer_s / deadline_s,
        link=None if transfer_s is None else transfer_s / deadline_s,
        refused=refused / (refused + len(sent)) if refused + len(sent) else None,
    )
    return DeviceFinding(
        name=device.name,
        counted=len(counted),
        refused=refused,
        machine=f"{told.machine}, {told.cores} cores" if told else None,
        up_bytes_s=up_bytes_s,
        up_by=up_by,
        down_bytes_s=down_bytes_s,
        round_trip_s=_told(told.round_trip_s) if told else None,
        up_bytes=up_bytes,
        down_bytes=down_bytes,
        transfer_s=transfer_s,
        train_s=train_s,
        step_s=_told(told.step_s) if told else None,
        examples=_examples(trial, counted, rounds),
        example_s=_median(_example_s(update, rounds[update.receipt.round].plan) for update in counted),
        answer_s=answer_s,
        peak_mb=peak_mb,
        available_mb=told.available_mb if told else None,
        shares=shares,
        grades=grade_device(shares, counted=len(counted)),
    )


def _told(value: float | UnsetType) -> float | None:
    return None if value is UNSET else value


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _up_speed(
    trial: Trial, device: wire.DeviceStatus, sent: Sequence[UpdateRecord]
) -> tuple[float | None, Literal["server", "device"] | None]:
    """Bytes a second, and who measured it: the server is believed first."""
    timed = [
        (update.bytes, seconds)
        for update in sent
        if update.bytes >= LEAST_TIMED_BYTES
        and (seconds := trial.arrivals.get((update.receipt.round, device.name))) is not None
    ]
    if timed:
        return sum(size for size, _ in timed) / sum(seconds for _, seconds in timed), "server"
    told = _told(device.capability.up_bytes_s) if device.capability else None
    return told, None if told is None else "device"


def _transfer_s(*ways: tuple[float | None, float | None]) -> float | None:
    """Seconds for (bytes, bytes a second) of every way; None where one of them is not known."""
    total = 0.0
    for size, speed in ways:
        if size is None or speed is None:
            return None
        total += size / speed
    return total


def _answers(
    device: wire.DeviceStatus, counted: Sequence[UpdateRecord], rounds: dict[int, TrialRound]
) -> Sequence[float]:
    """Seconds from when a round was there for the device to its update; without its first, for which it fetched all."""
    found = [
        update.received - max(rounds[update.receipt.round].opened, device.enrolled)
        for update in sorted(counted, key=lambda update: update.receipt.round)
    ]
    return found[1:] or found


def _examples(trial: Trial, counted: Sequence[UpdateRecord], rounds: dict[int, TrialRound]) -> int | None:
    """A classifier's weight is its examples; a language model's is tokens, so whole batches are counted there."""
    if not counted:
        return None
    last = max(counted, key=lambda update: update.receipt.round)
    if trial.manifest.task == "classify":
        return last.receipt.weight
    training = rounds[last.receipt.round].plan.training
    return last.metrics.steps * training.batch_size // training.epochs if training.epochs else None


def _example_s(update: UpdateRecord, plan: wire.Plan) -> float | None:
    trained = update.metrics.steps * plan.training.batch_size
    return None if update.metrics.seconds is None or not trained else update.metrics.seconds / trained
