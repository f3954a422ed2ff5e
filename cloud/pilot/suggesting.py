"""From a pilot's devices to budget and schedule, and what these move and compute in a month. Pure.

A budget is only suggested where links need one, and only one that the planner can keep to: the config with it is
settled as the aggregator would settle it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

from cloud.budgeting import least_budget, with_budget
from cloud.config import Config, config_problems
from cloud.pilot.devices import percentile
from cloud.pilot.findings import DeviceFinding, Month, Suggestion, Wish
from cloud.pilot.trial import Trial
from cloud.planner import Annealing

TRANSFER_SHARE = 0.25  # of a deadline may go into moving bytes: the rest is for training and for being late
USEFUL = 0.2  # of the devices may be slower than what is planned for: a round does not wait for them
LEAST_DEADLINE_S = 60
DEFAULT_ROUNDS = 12  # TaskConfig's default: tasks of MiniLM's size have settled by then
DEFAULT_ROUNDS_PER_DAY = 24.0
BUDGETED_POLICY = "annealed-kill-revive"  # where the pilot's policy has no budget
_DAY_S, _MONTH_DAYS = 86_400, 30
_EXACT_SUM = 2**27  # devices_per_round · weight_cap, as the config demands


def suggest(trial: Trial, devices: Sequence[DeviceFinding], wish: Wish) -> Suggestion:
    """Budget and schedule for as many devices as are wished."""
    task = trial.config.task
    count = wish.devices or max(len(devices), 1)
    least_devices = min(2, count)
    enough = max(math.floor((1 - USEFUL) * count), least_devices)
    per_round = min(enough, _EXACT_SUM // task.weight_cap)
    deadline_s = _deadline_s(trial, devices, wish)
    rounds = wish.rounds or max(task.rounds, DEFAULT_ROUNDS)
    schedule = msgspec.structs.replace(
        task,
        rounds=rounds,
        devices_per_round=per_round,
        min_devices=max(math.ceil(per_round / 2), min(least_devices, per_round)),
        round_deadline_s=float(deadline_s),
    )
    affordable = affordable_bytes(devices, deadline_s)
    config = msgspec.structs.replace(trial.config, task=schedule)
    moved = sum(part or 0.0 for part in _round_bytes(devices, None))
    chosen, least, note = _with_suitable_budget(config, trial, affordable, math.ceil(moved))
    budget = chosen.annealing.bytes_per_device_per_round
    settled = with_budget(chosen, trial.manifest).task
    ways = msgspec.structs.replace(chosen.task, upload=settled.upload, download=settled.download)
    chosen = msgspec.structs.replace(chosen, task=ways)
    return Suggestion(
        devices=count,
        devices_per_round=per_round,
        min_devices=schedule.min_devices,
        rounds=rounds,
        round_deadline_s=deadline_s,
        rounds_per_day=min(wish.rounds_per_day or DEFAULT_ROUNDS_PER_DAY, _DAY_S / deadline_s),
        policy=chosen.task.policy,
        upload=chosen.task.upload,
        download=chosen.task.download,
        affordable_bytes=affordable,
        bytes_per_device_per_round=budget,
        least_bytes=least,
        note=note,
        toml=_toml(chosen),
    )


def affordable_bytes(devices: Sequence[DeviceFinding], deadline_s: float) -> int | None:
    """What the slowest useful link moves, up and down, within its share of a deadline; None where none was timed."""
    moved = [_link_bytes_s(device) for device in devices]
    known = sorted(speed for speed in moved if speed is not None)
    return int(TRANSFER_SHARE * deadline_s * known[math.floor(USEFUL * len(known))]) if known else None


def _link_bytes_s(device: DeviceFinding) -> float | None:
    """Bytes of a round, up and down as the pilot's were, that the link moves in a second."""
    if device.up_bytes_s is None or device.down_bytes_s is None:
        return None
    up = up_share([device])
    return 1 / (up / device.up_bytes_s + (1 - up) / device.down_bytes_s)


def up_share(devices: Sequence[DeviceFinding]) -> float:
    """The part of a round's bytes that goes up; half where it is not known."""
    up = sum(device.up_bytes or 0.0 for device in devices)
    total = up + sum(device.down_bytes or 0.0 for device in devices)
    return up / total if total else 0.5


def _deadline_s(trial: Trial, devices: Sequence[DeviceFinding], wish: Wish) -> int:
    if wish.round_s is not None:
        return max(round(wish.round_s), 1)
    answers = [device.answer_s + _extra_s(device, wish, trial) for device in devices if device.answer_s is not None]
    slow = percentile(answers, 0.9)
    if slow is None:
        return math.ceil(trial.config.task.round_deadline_s)
    return max(LEAST_DEADLINE_S, 10 * math.ceil(2 * slow / 10))


def _extra_s(device: DeviceFinding, wish: Wish, trial: Trial) -> float:
    """How much longer a round takes with as many examples as are wished; a number of steps does not care."""
    return ((work_factor(device, wish, trial.config) - 1) * device.train_s) if device.train_s else 0.0


def work_factor(device: DeviceFinding, wish: Wish, config: Config) -> float:
    """The work of a wished round by that of the pilot's."""
    if wish.examples is None or not device.examples or config.training.steps is not None:
        return 1.0
    return wish.examples / device.examples


def _with_suitable_budget(config: Config, trial: Trial, affordable: int | None, moved: int) -> tuple[Config, int, str]:
    """The config with a budget that links can bear, the least there could be, and why.

    Where the config allows no policy with a budget, the least is what a round ``moved`` in the pilot.
    """
    plain, budgeted = _without_bytes(config), _budgeted(config, 1)
    problems = config_problems(budgeted)
    if problems:
        return plain, moved, f"none, as it would need a policy with a budget ({problems[0]})"
    least = least_budget(budgeted, trial.manifest)
    if affordable is None:
        return plain, least, "unknown: bodies were too small, or devices too silent, to tell how fast links are"
    if affordable < least:
        note = f"the least that {budgeted.task.policy} can keep to, which is more than the slowest useful link affords"
        return _budgeted(config, least), least, note
    budget = max(_round_down(affordable), least)
    chosen = _budgeted(config, budget)
    settled = with_budget(chosen, trial.manifest)
    whole = settled.annealing.budget_end >= 1 and settled.task.upload == settled.task.download == "float32"
    if whole:
        note = "none: everything, exact, is less than the slowest useful link moves in a quarter of the deadline"
        return plain, least, note
    return chosen, least, "what the slowest useful link moves in a quarter of the deadline"


def _budgeted(config: Config, budget: int) -> Config:
    task, settings = config.task, config.annealing
    exact = task.aggregation == "stack"  # its updates must be float32
    task = msgspec.structs.replace(
        task,
        policy=BUDGETED_POLICY if task.policy == "fixed" else task.policy,
        upload="float32" if exact else "auto",
        download="auto",
    )

    def given(settings: Annealing) -> Config:
        bytes_ = msgspec.structs.replace(settings, bytes_per_device_per_round=budget, total_bytes=None)
        return msgspec.structs.replace(config, task=task, annealing=bytes_)

    asked = given(settings)
    # The pilot's [annealing] may not fit another number of rounds, or never have been looked at.
    return given(Annealing(initiating_rounds=0, final_rounds=0)) if config_problems(asked) else asked


def _without_bytes(config: Config) -> Config:
    """The pilot's own way of sending; a budget for the pilot's few rounds says nothing of the task's."""
    if config.annealing.bytes_per_device_per_round is None and config.annealing.total_bytes is None:
        return config
    settings = msgspec.structs.replace(config.annealing, bytes_per_device_per_round=None, total_bytes=None)
    task = config.task
    ways = {name: "float32" for name in ("upload", "download") if getattr(task, name) == "auto"}
    return msgspec.structs.replace(config, task=msgspec.structs.replace(task, **ways), annealing=settings)


def _round_down(value: int) -> int:
    """To two digits: more would be pretence."""
    unit: int = 10 ** max(len(str(value)) - 2, 0)
    return value // unit * unit


def _toml(config: Config) -> str:
    task, budget = config.task, config.annealing.bytes_per_device_per_round
    lines = [
        "[task]",
        f'policy = "{task.policy}"',
        f'upload = "{task.upload}"',
        f'download = "{task.download}"',
        f"rounds = {task.rounds}",
        f"devices_per_round = {task.devices_per_round}",
        f"min_devices = {task.min_devices}",
        f"round_deadline_s = {task.round_deadline_s:.0f}",
    ]
    if budget is not None:
        settings = config.annealing
        lines += [
            "",
            "[annealing]",
            f"bytes_per_device_per_round = {budget}",
            f"budget_start = {settings.budget_start}",
            f"budget_end = {settings.budget_end}",
            f"initiating_rounds = {settings.initiating_rounds}",
            f"final_rounds = {settings.final_rounds}",
        ]
    return "\n".join(lines) + "\n"


def month_of(trial: Trial, devices: Sequence[DeviceFinding], suggestion: Suggestion, wish: Wish) -> Month:
    """What thirty days of the suggestion move and compute."""
    rounds = suggestion.rounds_per_day * _MONTH_DAYS
    up, down = _round_bytes(devices, suggestion.bytes_per_device_per_round)
    hours = [
        device.train_s * work_factor(device, wish, trial.config) * rounds / 3600 for device in devices if device.train_s
    ]
    return Month(
        rounds=rounds,
        device_up=None if up is None else up * rounds,
        device_down=None if down is None else down * rounds,
        bundle=trial.bundle_bytes,
        server_up=None if up is None else up * rounds * suggestion.devices_per_round,
        server_down=None if down is None else down * rounds * suggestion.devices,
        hours_median=statistics.median(hours) if hours else None,
        hours_slowest=max(hours, default=None),
    )


def _round_bytes(devices: Sequence[DeviceFinding], budget: int | None) -> tuple[float | None, float | None]:
    """Of a device in a round, up and down: the budget divided as the pilot's bytes were, or these themselves."""
    if budget is not None:
        return up_share(devices) * budget, (1 - up_share(devices)) * budget
    ups = [device.up_bytes for device in devices if device.up_bytes is not None]
    downs = [device.down_bytes for device in devices if device.down_bytes is not None]
    return statistics.fmean(ups) if ups else None, statistics.fmean(downs) if downs else None
