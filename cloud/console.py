"""What the server shows while it runs: one line an event for people, or one JSON object a line for programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cloud import events
from edge_runtime.wire import DeviceStatus, Outlier, RoundStatus, TaskStatus


def json_reporter(write: Callable[[str], None]) -> events.Report:
    """A reporter that writes one JSON object a line."""

    def report(event: events.Event) -> None:
        write(msgspec.json.encode(event).decode())

    return report


def text_reporter(console: Console) -> events.Report:
    """A reporter that prints one line an event."""

    def report(event: events.Event) -> None:
        console.print(Text(describe(event)), soft_wrap=True)

    return report


def describe(event: events.Event) -> str:
    """An event in one line."""
    if isinstance(event, events.UpdateCounted):
        return (
            f"round {event.round_}: {event.received}/{event.wanted} updates · {event.device} · weight {event.weight} · "
            f"loss {figure(event.loss_start)} → {figure(event.loss_end)} · {size(event.bytes)}"
        )
    if isinstance(event, events.RoundApplied):
        s = event.status
        what = "class means" if s.state == "measure" else f"loss {figure(s.loss_start)} → {figure(s.loss_end)}"
        return (
            f"round {s.round + 1} of {event.rounds} applied: {s.devices} devices · {what} · "
            f"metric at its start {figure(s.metric)} · {size(s.bytes_up)} up · {s.seconds:.1f} s{_idle(s)}{_judged(s)}"
        )
    if isinstance(event, events.ServerStarted):
        return (
            f"EmberLoRA aggregator at {event.url}: task {event.task}, {event.state}, round {event.round_}, "
            f"{event.received} updates there already"
        )
    if isinstance(event, events.TaskFinished):
        lost = f", {event.discarded} updates of the open round discarded" if event.discarded else ""
        return f"task finished after {event.rounds_applied} rounds{lost}; adapter in {event.published}"
    return _describe_rest(event)


def _describe_rest(event: events.Event) -> str:
    if isinstance(event, events.DatabaseMigrated):
        return f"database migrated from schema {event.found} to {event.schema}"
    if isinstance(event, events.DeviceEnrolled):
        return f"device {event.device} enrolled"
    if isinstance(event, events.DeviceLeft):
        return f"device {event.device} left"
    if isinstance(event, events.DeviceRekeyed):
        return f"device {event.device} has a new key"
    if isinstance(event, events.DeviceRevoked):
        return f"device {event.device} revoked: its key is refused from now on"
    if isinstance(event, events.PlanKeyChanged):
        return f"plan key {event.plan_key[:12]} is new: it signs plans from round {event.round_ + 1} on"
    if isinstance(event, events.DeadlineMoved):
        return (
            f"round {event.round_}: deadline passed with {event.received} of at least {event.min_devices} updates; "
            "waiting for one more deadline"
        )
    if isinstance(event, events.RequestRefused):
        return f"refused ({event.problem}): {event.method} {event.path}: {event.detail}"
    if isinstance(event, events.WorkFailed):
        return f"failed: {event.what}: {event.detail}"
    return type(event).__name__


def _idle(status: RoundStatus) -> str:
    """What did not move for want of devices."""
    if not status.idle:
        return ""
    parts = sum(map(len, status.idle.values()))
    named = ", ".join(list(status.idle)[:3]) + (f" and {len(status.idle) - 3} more" if len(status.idle) > 3 else "")
    return f" · carried by fewer than two devices, so not moved: {parts} components of {named}"


def _judged(status: RoundStatus) -> str:
    """What the rule for outliers did, if there is one."""
    if status.judged == 0:
        return " · outliers not looked for: too few devices"
    return "".join(f" · {outlier_line(outlier)}" for outlier in status.outliers)


def outlier_line(outlier: Outlier) -> str:
    """An outlier, and why it is one."""
    done = "would be set aside, and is kept because too few were left" if outlier.kept else "set aside"
    if outlier.rule == "norm":
        why = f"norm {outlier.measured:g} times the median of {outlier.devices}, more than {outlier.bound:g}"
    else:
        why = f"cosine {outlier.measured:g} with the mean of {outlier.devices - 1} others, below {outlier.bound:g}"
    return f"{outlier.device} {done}: {why}"


def figure(value: float | None) -> str:
    """A loss or metric, or a dash."""
    return "–" if value is None else f"{value:.4f}"


def size(count: float) -> str:
    """Bytes in the unit that suits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def status_view(status: TaskStatus, *, now: float) -> Table:
    """Task, devices and rounds, one below the other."""
    view = Table.grid(padding=(0, 0, 1, 0))
    view.add_row(Text(headline(status, now=now), overflow="fold"))
    if status.devices:
        view.add_row(_device_table(status.devices, now=now))
    if status.history:
        view.add_row(_round_table(status.history, metric=status.metric))
    found = [f"round {r.round + 1}: {outlier_line(outlier)}" for r in status.history for outlier in r.outliers]
    if found:
        view.add_row(Text("\n".join(("Outliers", *found)), overflow="fold"))
    if status.audit_head:  # a server from before the log has none
        view.add_row(Text(f"audit log up to {status.audit_head}", overflow="fold"))
    return view


def headline(status: TaskStatus, *, now: float) -> str:
    """The task in one line."""
    traffic = f"{size(status.bytes_up)} up, {size(status.bytes_down)} down"
    if status.state == "finished":
        return f"{status.task}: finished after {len(status.history)} rounds · {traffic} · adapter {status.adapter[:12]}"
    left = max(status.deadline - now, 0)
    return (
        f"{status.task}: round {status.round + 1} of {status.rounds} · {status.received}/{status.wanted} updates · "
        f"deadline in {left:.0f} s · {traffic} · adapter {status.adapter[:12]}"
    )


def _device_table(devices: tuple[DeviceStatus, ...], *, now: float) -> Table:
    table = Table(
        *("device", "updates", "tier", "up", "down", "last seen", "trained", "memory"),
        title="Devices",
        title_justify="left",
    )
    for device in devices:
        seen = "never" if device.last_seen is None else f"{max(now - device.last_seen, 0):.0f} s ago"
        if device.left or device.revoked is not None:
            seen = "left" if device.revoked is None else "revoked"
        table.add_row(
            device.name,
            str(device.updates) + (f" ({device.set_aside} set aside)" if device.set_aside else ""),
            "–" if device.tier is None else str(device.tier),
            size(device.bytes_up),
            size(device.bytes_down),
            seen,
            "–" if device.train_s is None else f"{device.train_s:.1f} s",
            "–" if device.peak_private_mb is None else f"{device.peak_private_mb:.0f} MB",
        )
    return table


def _round_table(history: tuple[RoundStatus, ...], *, metric: str) -> Table:
    head = ("round", "devices", "weight", "loss", metric, "up", "time")
    table = Table(*head, title=f"Rounds ({metric} of the adapter a round started from)", title_justify="left")
    for r in history:
        loss = "class means" if r.state == "measure" else f"{figure(r.loss_start)}→{figure(r.loss_end)}"
        cells = (r.devices, r.weight, loss, figure(r.metric), size(r.bytes_up), f"{r.seconds:.1f} s")
        table.add_row(str(r.round + 1), *(str(cell) for cell in cells))
    return table


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A line a row, its cells under one another; plain text, whatever the width of the terminal. At least one row."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
