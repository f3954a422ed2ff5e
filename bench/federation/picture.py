"""Accuracy or held-out loss against megabytes in one HTML file, for no network: a panel a split, a colour a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bench.federation.lines import Line
from bench.federation.summary import Name, Split, splits_of

_COLOURS = (
    "#1d4ed8",
    "#ea580c",
    "#65a30d",
    "#9333ea",
    "#78350f",
    "#0891b2",
    "#be123c",
    "#ca8a04",
    "#4b5563",
    "#16a34a",
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111827; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
p { color: #4b5563 }
"""


def write_picture(path: Path, lines: Sequence[Line]) -> None:
    """Write the page; ``lines`` are one or more."""
    figure = _figure(lines)
    drawn = figure.to_html(full_html=False, config={"displayModeBar": False, "responsive": True})
    path.write_text(
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>EmberLoRA: what a byte teaches</title><style>{_STYLE}</style></head><body><h1>What a byte teaches</h1>"
        "<p>Accuracy on a part of the test texts, or where an axis says so the loss of a language model, against what "
        f"devices have sent and fetched so far, round by round; means over the seeds.</p>{drawn}</body></html>\n",
        encoding="utf-8",
    )


def _figure(lines: Sequence[Line]) -> go.Figure:
    splits = splits_of(lines)
    columns = min(2, len(splits))
    rows = -(-len(splits) // columns)
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=[str(split) for split in splits])
    names = list(dict.fromkeys((line.method, line.budget, line.without) for line in lines))
    shown: set[Name] = set()
    for number, split in enumerate(splits):
        for name in names:
            mine = [line for line in lines if _belongs(line, split, name)]
            if mine:
                place = number // columns + 1, number % columns + 1
                _draw(figure, mine, place, (_COLOURS[names.index(name) % len(_COLOURS)], name not in shown))
                figure.update_yaxes(title=mine[0].metric.title, row=place[0], col=place[1])
                shown.add(name)
    figure.update_xaxes(type="log", title="MB both ways, all devices")
    figure.update_layout(
        template="plotly_white",
        height=420 * rows + 120,
        legend={"orientation": "h", "y": 1.05, "yanchor": "bottom", "x": 0},
        hoverlabel_namelength=-1,
    )
    return figure


def _belongs(line: Line, split: Split, name: Name) -> bool:
    return Split(line.dataset, line.alpha) == split and (line.method, line.budget, line.without) == name


def _draw(figure: go.Figure, lines: Sequence[Line], place: tuple[int, int], style: tuple[str, bool]) -> None:
    """One method's curve; ``style`` is its colour and whether the legend has to name it."""
    colour, named = style
    sent = np.mean([np.cumsum([made.bytes_both for made in line.curve]) for line in lines], axis=0) / 1e6
    measured = [index for index, value in enumerate(lines[0].values) if value is not None]
    values = [float(np.mean([line.values[index] for line in lines])) for index in measured]
    label = " ".join(
        part for part in (lines[0].method, lines[0].budget, lines[0].without and f"− {lines[0].without}") if part
    )
    figure.add_scatter(
        x=[float(sent[index]) for index in measured],
        y=values,
        mode="lines+markers",
        marker_size=5,
        line={"color": colour, "width": 2},
        name=label,
        legendgroup=label,
        showlegend=named,
        hovertemplate="%{y:.3f} at %{x:.2f} MB",
        row=place[0],
        col=place[1],
    )
