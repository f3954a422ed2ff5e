"""The curves as one HTML file that needs no network: a panel a task, a colour a system, a band over the seeds."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bench.learning.lines import REFERENCE, SYSTEMS, Line, System, rows_of
from edge_runtime.bundle import Array

_COLOURS: dict[System, str] = {
    "peft": "#1d4ed8",
    "emberlora-fp32": "#ea580c",
    "emberlora-fp16": "#65a30d",
    "emberlora-int8": "#9333ea",
    "emberlora-int4": "#78350f",
    "emberlora-int8-fast": "#9333ea",
    "emberlora-fp32-fast": "#ea580c",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111827; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem }
p { color: #4b5563; margin: .2rem 0 .6rem } table { border-collapse: collapse; font-size: .85rem }
td, th { padding: .3rem .7rem; border-bottom: 1px solid #e5e7eb; text-align: right; font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left }
"""
_COLUMNS = ("system", "seeds", "at the end", "− peft, mean", "− peft, largest", "training s")
_NAMES = {"accuracy": "held-out accuracy", "loss": "held-out loss, nats a token"}


def write_picture(path: Path, lines: Sequence[Line]) -> None:
    """Write the page; ``lines`` are one or more, all of the same number of steps."""
    path.write_text(page(lines), encoding="utf-8")


def page(lines: Sequence[Line]) -> str:
    """The whole page, plotly's script in it."""
    tasks = list(dict.fromkeys(line.task for line in lines))
    drawn = _figure(lines, tasks).to_html(full_html=False, config={"displayModeBar": False, "responsive": True})
    tables = "".join(f"<h2>{html.escape(task)}</h2>{_table(lines, task)}" for task in tasks)
    hosts = dict.fromkeys(f"{line.host.get('cpu')}, {line.host.get('threads')} threads" for line in lines)
    commits = dict.fromkeys(line.commit for line in lines)
    about = f"{'; '.join(hosts)} · commit {', '.join(commits)} · {lines[0].steps} steps"
    note = (
        "The same examples in the same order, the same adapter at the start, the same rates; each system is measured "
        "with its own base, in exact products. A curve is the mean over the seeds, the band their range. Below: the "
        "mean difference to peft on the same seeds."
    )
    if lines[0].quick:
        note += " This was a quick run: few steps, few held-out examples."
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>EmberLoRA: learning beside peft</title><style>{_STYLE}</style></head><body>"
        f"<h1>Is learning lost?</h1><p>{html.escape(about)}</p><p>{note}</p>{drawn}{tables}</body></html>\n"
    )


def _figure(lines: Sequence[Line], tasks: Sequence[str]) -> go.Figure:
    titles = [f"{task}: {_NAMES[next(line.metric for line in lines if line.task == task)]}" for task in tasks]
    titles += [f"{task}: minus peft" for task in tasks]
    heights = [0.62, 0.38]
    spacing = {"horizontal_spacing": 0.08, "vertical_spacing": 0.12}
    figure = make_subplots(rows=2, cols=len(tasks), subplot_titles=titles, row_heights=heights, **spacing)
    named: set[System] = set()
    for column, task in enumerate(tasks, start=1):
        for system in SYSTEMS:
            mine = [line for line in lines if (line.task, line.system) == (task, system)]
            if mine:
                _draw(figure, mine, column, named=system not in named)
                _draw_difference(figure, mine, _of_reference(lines, task), column)
                named.add(system)
    figure.update_xaxes(title="steps", row=2)
    figure.update_layout(
        template="plotly_white",
        height=820,
        margin={"l": 10, "r": 20, "t": 110, "b": 45},
        legend={"orientation": "h", "y": 1.06, "yanchor": "bottom", "x": 0},
        hovermode="x unified",
        hoverlabel_namelength=-1,
    )
    return figure


def _draw(figure: go.Figure, lines: Sequence[Line], column: int, *, named: bool) -> None:
    """Mean and range of one system's curves."""
    system = lines[0].system
    values = np.array([[value for _, value in line.curve] for line in lines])  # (seeds, points)
    if len(lines) > 1:
        steps = [step for step, _ in lines[0].curve]
        figure.add_scatter(
            x=[*steps, *steps[::-1]],
            y=[*values.max(axis=0), *values.min(axis=0)[::-1]],
            fill="toself",
            fillcolor=_COLOURS[system],
            opacity=0.1,
            line_width=0,
            hoverinfo="skip",
            showlegend=False,
            legendgroup=system,
            row=1,
            col=column,
        )
    _draw_curve(figure, lines, values.mean(axis=0), (1, column), number=".4f", named=named)


def _of_reference(lines: Sequence[Line], task: str) -> dict[int, Line]:
    """The reference's training of every seed."""
    return {line.seed: line for line in lines if (line.task, line.system) == (task, REFERENCE)}


def _draw_difference(figure: go.Figure, lines: Sequence[Line], reference: dict[int, Line], column: int) -> None:
    """Mean of a system's curves minus the reference's, over the seeds that both have."""
    pairs = [(line.curve, reference[line.seed].curve) for line in lines if line.seed in reference]
    if not pairs:
        return
    apart = [[mine[1] - its[1] for mine, its in zip(*pair, strict=True)] for pair in pairs]  # (seeds, points)
    _draw_curve(figure, lines, np.mean(apart, axis=0), (2, column), number="+.4f", named=False)


def _draw_curve(
    figure: go.Figure, lines: Sequence[Line], values: Array, panel: tuple[int, int], *, number: str, named: bool
) -> None:
    """One curve of a system, ``values`` (points,), into the panel of this row and column."""
    system = lines[0].system
    figure.add_scatter(
        x=[step for step, _ in lines[0].curve],
        y=values,
        mode="lines+markers",
        name=system,
        legendgroup=system,
        showlegend=named,
        line=_pen(system),
        hovertemplate=f"%{{y:{number}}}",
        row=panel[0],
        col=panel[1],
    )


def _pen(system: System) -> dict[str, object]:
    """The fast mode is dashed, in the colour of its base."""
    dash = "dash" if system.endswith("-fast") else "solid"
    return {"color": _COLOURS[system], "dash": dash, "width": 4 if system == REFERENCE else 2}


def _table(lines: Sequence[Line], task: str) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
    body = ""
    for row in rows_of(lines, task):
        cells = [row.system, str(row.seeds), f"{row.final:.4f}", *row.apart, f"{row.train_s:.1f}"]
        body += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
