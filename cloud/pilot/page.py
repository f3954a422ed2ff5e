"""A pilot's findings as one HTML file that needs no network: verdict, devices, suggestion, month, bars by device."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import plotly.graph_objects as go

from cloud.pilot.findings import DeviceFinding, Findings, Reason
from cloud.pilot.grades import LIMITS
from cloud.pilot.wording import HEAD, figures, graded, month_lines, verdict

_BLUE, _ORANGE, _GREY, _PALE = "#2563eb", "#ea580c", "#6b7280", "#d1d5db"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111827; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p { color: #4b5563; margin: .2rem 0 .8rem } table { border-collapse: collapse; width: 100% }
td, th { padding: .35rem .6rem; border-bottom: 1px solid #e5e7eb; text-align: left; vertical-align: top }
td { font-variant-numeric: tabular-nums } pre { background: #f3f4f6; padding: .8rem 1rem; overflow-x: auto }
.good { color: #059669 } .bad { color: #dc2626 } .open { color: #6b7280 } .scroll { overflow-x: auto }
.grade { font-weight: 700 } .share { white-space: nowrap } .verdict { font-size: 1.2rem; font-weight: 600 }
"""
_PASSED = {True: ("good", "✓"), False: ("bad", "✗"), None: ("open", "?")}
_COLOURS = {"A": "good", "B": "", "C": "bad", "–": "open"}


def write_pilot_page(path: Path, found: Findings) -> None:
    """Write the page."""
    path.write_text(pilot_page(found), encoding="utf-8")


def pilot_page(found: Findings) -> str:
    """The whole page; plotly's script stands in it once."""
    charts = [
        ("Time of a round", _time_note(found), time_chart(found)),
        ("Links", "As the server measured updates, and the device what it fetched. A gap: not measured.", links(found)),
        ("Memory", "Highest private memory while training, of what was free before.", memory_chart(found)),
    ]
    drawn = "".join(
        f"<h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>"
        + figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displayModeBar": False})
        for number, (title, note, figure) in enumerate(charts)
    )
    suggestion = found.suggestion
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>EmberLoRA: pilot of {html.escape(found.task)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Pilot of {html.escape(found.task)}</h1>"
        f"<p class='verdict {'good' if found.go else 'bad'}'>{html.escape(verdict(found))}</p>"
        f"{_reasons(found.reasons)}<h2>Devices</h2><p>{html.escape(_grades_note())}</p>{_devices(found.devices)}"
        f"<h2>Suggested for {suggestion.devices} devices</h2><p>Budget: {html.escape(suggestion.note)}.</p>"
        f"<pre>{html.escape(suggestion.toml)}</pre>{_month(found)}{drawn}</body></html>\n"
    )


def _reasons(reasons: Iterable[Reason]) -> str:
    rows = "".join(
        f"<tr><td class={_PASSED[reason.passed][0]}>{_PASSED[reason.passed][1]}</td><td>{html.escape(reason.about)}"
        f"</td><td>{html.escape(reason.figure)}</td><td>{html.escape(reason.wanted)}</td></tr>"
        for reason in reasons
    )
    return f"<table><tr><th></th><th></th><th>found</th><th>wanted</th></tr>{rows}</table>"


def _grades_note() -> str:
    said = ", ".join(f"{name} {best:.0%} and {good:.0%}" for name, (best, good) in LIMITS.items())
    return (
        f"A and B go up to: {said}. Memory is of what was free before, time and link are of the deadline, refused "
        "is of what a device sent. The worst letter is the device's."
    )


def _devices(devices: Iterable[DeviceFinding]) -> str:
    rows = "".join(f"<tr>{''.join(_cells(device))}</tr>" for device in devices)
    return f"<div class=scroll><table><tr>{''.join(f'<th>{name}</th>' for name in HEAD)}</tr>{rows}</table></div>"


def _cells(device: DeviceFinding) -> list[str]:
    name = html.escape(device.name) + (f"<br><small>{html.escape(device.machine)}</small>" if device.machine else "")
    overall = device.grades.overall
    return [
        f"<td>{name}</td>",
        f"<td class='grade {_COLOURS[overall]}'>{overall}</td>",
        *(f"<td class='share {_COLOURS[letter]}'>{text}</td>" for letter, text in graded(device)),
        *(f"<td>{html.escape(text)}</td>" for text in figures(device)),
    ]


def _month(found: Findings) -> str:
    first, *rest = month_lines(found.month)
    items = "".join(f"<li>{html.escape(line)}</li>" for line in rest)
    return f"<h2>A month</h2><p>{html.escape(first)}.</p><ul>{items}</ul>"


def _time_note(found: Findings) -> str:
    return (
        "The device's work (loading, evaluating, training) and moving a round's bytes, in the median; the mark is the "
        f"90th percentile from a round's opening to the update. The pilot's deadline was {found.deadline_s:.0f} s."
    )


def time_chart(found: Findings) -> go.Figure:
    """Bars of work and transfer by device, with marks for answers."""
    figure = go.Figure()
    names = _names(found.devices)
    figure.add_bar(x=names, y=[device.train_s for device in found.devices], name="work", marker_color=_BLUE)
    figure.add_bar(x=names, y=[device.transfer_s for device in found.devices], name="transfer", marker_color=_ORANGE)
    answers = [device.answer_s for device in found.devices]
    mark = {"symbol": "line-ew-open", "size": 28, "color": _GREY, "line": {"width": 3}}
    figure.add_scatter(x=names, y=answers, name="answer", mode="markers", marker=mark)
    return _laid_out(figure, "seconds", barmode="stack")


def links(found: Findings) -> go.Figure:
    """Bars of speeds up and down by device."""
    figure = go.Figure()
    names = _names(found.devices)
    ways = (("up", "up_bytes_s", _BLUE), ("down", "down_bytes_s", _ORANGE))
    for name, field, colour in ways:
        speeds = [getattr(device, field) for device in found.devices]
        values = [None if speed is None else speed * 8 / 1e6 for speed in speeds]
        # Written beside the bars, as a fast link makes the others too small to see.
        told = [None if value is None else f"{value:.3g}" for value in values]
        figure.add_bar(x=names, y=values, name=name, marker_color=colour, text=told, textposition="outside")
    return _laid_out(figure, "Mbit/s", barmode="group")


def memory_chart(found: Findings) -> go.Figure:
    """Bars of peak and free memory by device."""
    figure = go.Figure()
    names = _names(found.devices)
    figure.add_bar(x=names, y=[device.available_mb for device in found.devices], name="free", marker_color=_PALE)
    peaks = [device.peak_mb for device in found.devices]
    figure.add_bar(x=names, y=peaks, name="peak", marker_color=_BLUE, width=0.4)
    return _laid_out(figure, "MB", barmode="overlay")


def _names(devices: Sequence[DeviceFinding]) -> list[str]:
    return [device.name for device in devices]


def _laid_out(figure: go.Figure, unit: str, *, barmode: str) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        height=320,
        barmode=barmode,
        showlegend=True,
        margin={"l": 10, "r": 10, "t": 40, "b": 40},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        yaxis={"title": unit, "rangemode": "tozero"},
    )
    figure.update_xaxes(type="category")  # a device may be called 1
    return figure
