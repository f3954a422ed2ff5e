"""Go or no-go, with a reason a line: a figure, what it should be, and whether it is. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cloud.metrics import METRIC_NAMES
from cloud.pilot.devices import device_findings
from cloud.pilot.findings import DeviceFinding, Findings, Reason, Suggestion, Wish
from cloud.pilot.grades import LIMITS
from cloud.pilot.suggesting import month_of, suggest
from cloud.pilot.trial import Trial

LEAST_DEVICES = 2  # counted: what one device shows, it shows of itself
LEAST_ROUNDS = 2  # one of each factor, and a difference to judge learning by
MOST_REFUSED = 0.10  # of all updates that devices sent
LEAST_SUITABLE = 0.5  # of the devices must have an A or a B


def judge(trial: Trial, wish: Wish) -> Findings:
    """Everything that the trial says about the task as it is wished."""
    devices = device_findings(trial)
    suggestion = suggest(trial, devices, wish)
    trained = sum(round_.applied and round_.plan.state == "train" for round_ in trial.rounds)
    reasons = (
        _counted(devices),
        _rounds(trained),
        _waited(trial),
        _learned(trial),
        _memory(devices),
        _links(suggestion),
        _refused(trial, devices),
        _suitable(devices),
    )
    return Findings(
        task=trial.config.task.name,
        go=all(reason.passed is not False for reason in reasons),
        reasons=reasons,
        devices=devices,
        suggestion=suggestion,
        month=month_of(trial, devices, suggestion, wish),
        deadline_s=trial.config.task.round_deadline_s,
        rounds=trained,
    )


def _counted(devices: Sequence[DeviceFinding]) -> Reason:
    counted = sum(device.counted > 0 for device in devices)
    figure = f"{counted} of {len(devices)} devices were counted"
    return Reason("devices", figure, f"at least {LEAST_DEVICES}", counted >= LEAST_DEVICES)


def _rounds(trained: int) -> Reason:
    return Reason("rounds", f"{trained} rounds were applied", f"at least {LEAST_ROUNDS}", trained >= LEAST_ROUNDS)


def _waited(trial: Trial) -> Reason:
    """A round never closes below min_devices: its deadline moves instead, which is what is seen here."""
    waited = sum(round_.deadline > round_.plan.deadline for round_ in trial.rounds)
    least = trial.config.task.min_devices
    figure = f"{waited} of {len(trial.rounds)} rounds had fewer than min_devices ({least}) updates at their deadline"
    return Reason("deadlines", figure, "none", waited == 0)


def _learned(trial: Trial) -> Reason:
    """By the devices' own evaluation, of the adapter that a round started from; else by their training loss."""
    measured = [round_.metric for round_ in trial.history if round_.metric is not None]
    if len(measured) > 1:
        name = METRIC_NAMES[trial.manifest.task]
        wanted = "higher at the end" if name == "accuracy" else "lower at the end"
        better = measured[-1] > measured[0] if name == "accuracy" else measured[-1] < measured[0]
        return Reason("learning", f"{name} went from {measured[0]:.4f} to {measured[-1]:.4f}", wanted, better)
    losses = [round_.loss_start for round_ in trial.history if round_.loss_start is not None]
    if len(losses) > 1:
        figure = f"training loss went from {losses[0]:.4f} to {losses[-1]:.4f}; no device evaluated"
        return Reason("learning", figure, "lower at the end", losses[-1] < losses[0])
    return Reason("learning", "cannot say: fewer than two rounds were measured", "better at the end", None)


def _memory(devices: Sequence[DeviceFinding]) -> Reason:
    limit = LIMITS["memory"][1]
    known = [(device.shares.memory, device) for device in devices if device.shares.memory is not None]
    wanted = f"at most {limit:.0%}"
    if not known:
        return Reason("memory", "cannot say: no device told both its peak and its free memory", wanted, None)
    share, fullest = max(known, key=lambda pair: pair[0])
    figure = f"{fullest.name} used {share:.0%} of its free memory, {fullest.peak_mb:.0f} MB"
    return Reason("memory", figure, wanted, share <= limit)


def _links(suggestion: Suggestion) -> Reason:
    wanted = f"at least {suggestion.least_bytes:,} bytes, the least that a round can be planned with"
    if suggestion.affordable_bytes is None:
        return Reason("links", "cannot say: no link was timed with a body of 64 KiB or more, both ways", wanted, None)
    figure = f"the slowest useful link moves {suggestion.affordable_bytes:,} bytes in a quarter of the deadline"
    return Reason("links", figure, wanted, suggestion.affordable_bytes >= suggestion.least_bytes)


def _refused(trial: Trial, devices: Sequence[DeviceFinding]) -> Reason:
    refused = sum(device.refused for device in devices)
    sent = refused + len(trial.updates)
    share = refused / sent if sent else math.nan
    wanted = f"at most {MOST_REFUSED:.0%}"
    if not sent:
        return Reason("refusals", "cannot say: no update came", wanted, None)
    named: dict[str, int] = {}
    for problems in trial.refusals.values():
        for name, count in problems.items():
            named[name] = named.get(name, 0) + count
    why = f" ({', '.join(f'{name} {count}' for name, count in sorted(named.items()))})" if named else ""
    figure = f"{refused} of {sent} updates were refused or too late{why}"
    return Reason("refusals", figure, wanted, share <= MOST_REFUSED)


def _suitable(devices: Sequence[DeviceFinding]) -> Reason:
    suitable = sum(device.grades.overall in ("A", "B") for device in devices)
    figure = f"{suitable} of {len(devices)} devices have grade A or B"
    return Reason(
        "grades", figure, f"at least {LEAST_SUITABLE:.0%}", bool(devices) and suitable >= LEAST_SUITABLE * len(devices)
    )
