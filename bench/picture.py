"""The results as one HTML file that needs no network: times, memory, and what killing saves."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from bench.alive import WHOLE
from bench.display import how, measured, ratios, share_of_whole
from bench.results import Line
from bench.shapes import CASES
from bench.systems import FLOOR, SYSTEM_NAMES, parse_setting

# One colour a system, the fast setting and AMX off in the same colour.
_COLOURS = {
    "emberlora-fp32": "#ea580c",
    "emberlora-int8": "#f59e0b",
    "emberlora-int4": "#a16207",
    "torch-eager": "#93c5fd",
    "torch-compile": "#2563eb",
    "torch-bf16": "#1e3a8a",
    "ort-training": "#9ca3af",
    "gemm-floor": "#111827",
}
_SYMBOLS = {
    ("exact", "computed"): "circle",
    ("exact", "remembered"): "diamond",
    ("fast", "computed"): "square",
    ("fast", "remembered"): "star",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111827; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem }
p.note { color: #4b5563; margin: .2rem 0 .6rem } table { border-collapse: collapse; width: 100%; font-size: .8rem }
td, th { padding: .3rem .4rem; border-bottom: 1px solid #e5e7eb; text-align: right }
td { white-space: nowrap } th { vertical-align: bottom }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
td { font-variant-numeric: tabular-nums } tr.ours td:first-child { color: #c2410c; font-weight: 600 }
.scroll { overflow-x: auto }
"""
_COLUMNS = (
    "system",
    "setting",
    "step ms",
    "p95",
    "optimizer + other",
    "private MiB",
    "total MiB",
    "kept MiB",
    "grad. error",
    "× compiled",
    "× best torch",
    "× products",
)


def write_picture(path: Path, lines: Sequence[Line]) -> None:
    """Write the page."""
    path.write_text(page(lines), encoding="utf-8")


def page(lines: Sequence[Line]) -> str:
    """The whole page; plotly's script stands in it once."""
    cases = list(CASES)
    lines = sorted(lines, key=lambda line: (cases.index(line.case), SYSTEM_NAMES.index(line.system)))
    sections = []
    scripted = False
    for title, note, figure, rows in _sections(lines):
        drawn = figure.to_html(
            full_html=False, include_plotlyjs=not scripted, config={"displayModeBar": False, "responsive": True}
        )
        scripted = True
        sections.append(
            f"<h2>{html.escape(title)}</h2><p class=note>{html.escape(note)}</p>{drawn}{_table(rows, lines)}"
        )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>EmberLoRA: one training step</title><style>{_STYLE}</style></head>"
        f"<body>{_head(lines)}{''.join(sections)}</body></html>\n"
    )


Section = tuple[str, str, go.Figure, Sequence[Line]]  # title, note, figure, rows of the table below it


def _sections(lines: Sequence[Line]) -> Iterable[Section]:
    for case in _distinct(line.case for line in lines):
        whole = [line for line in lines if line.case == case and line.pattern == WHOLE]
        if any(line.system != FLOOR for line in whole):
            yield f"Step time: {_about(case)}", _time_note(whole), _time_chart(whole), whole
    for case in _distinct(line.case for line in lines):
        whole = [line for line in lines if line.case == case and line.pattern == WHOLE and line.system != FLOOR]
        if whole:
            yield f"Peak memory: {_about(case)}", _MEMORY_NOTE, _memory_chart(whole), ()
    for case in _distinct(line.case for line in lines):
        part = [line for line in lines if line.case == case]
        if len({line.pattern for line in part}) > 1:
            dead = [line for line in part if line.pattern != WHOLE]
            yield f"What killing saves: {_about(case)}", _ALIVE_NOTE, _alive_chart(part), dead


_MEMORY_NOTE = (
    "Since the process began, imports and warm-up included. Private memory belongs to the process alone; total adds "
    "mapped files, weights and libraries among them."
)
_INSIDE_NOTE = (
    " Optimizer + other: shares of the step outside ONNX Runtime's own code; other is Python, binding and transfers. "
    "Kept: tensors held between the forward and the backward pass."
)
_ALIVE_NOTE = (
    "The topmost part of the modules is alive. Circles apart from the lines: half of the modules, scattered, or one "
    "factor of every module. Remembered: what the blocks below the lowest alive one make of the batch is read from a "
    "file; × all alive compares it with computing everything. The axis begins at zero, so that heights can be compared."
)


def _head(lines: Sequence[Line]) -> str:
    hosts = _distinct(
        f"{line.host.get('cpu')}, {line.host.get('cores')} cores, {line.host.get('threads')} threads" for line in lines
    )
    versions = _distinct(
        ", ".join(f"{name} {line.host[name]}" for name in ("onnxruntime", "torch", "python") if name in line.host)
        for line in lines
    )
    days = sorted({line.when[:10] for line in lines})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    commits = _distinct(line.commit for line in lines)
    quick = any(line.quick for line in lines)
    warning = "<p class=note>Some rows are of a quick run: few steps, PyTorch not tuned.</p>" if quick else ""
    return (
        "<h1>One LoRA training step on a CPU</h1>"
        f"<p class=note>{html.escape('; '.join(hosts))} · {html.escape('; '.join(versions))}<br>"
        f"{html.escape(when)} · commit {html.escape(', '.join(commits))} · rank 8 on all linear layers, random "
        "weights; forward, backward and optimizer together</p>" + warning
    )


def _about(case: str) -> str:
    size = CASES[case]
    return f"{size.model}, {size.batch} × {size.tokens} tokens"


def _time_note(lines: Sequence[Line]) -> str:
    count = min(line.steps for line in lines)
    note = f"Median of {count} steps or more; the whisker ends at the 95th percentile."
    floors = any(line.system == FLOOR for line in lines)
    note += " Dashed: the matrix products alone, which no implementation can leave out." if floors else ""
    return note + (_INSIDE_NOTE if any(line.kept_mb is not None for line in lines) else "")


def _time_chart(lines: Sequence[Line]) -> go.Figure:
    bars = [line for line in lines if line.system != FLOOR]
    figure = _figure("milliseconds a step", len(bars))
    figure.add_bar(
        orientation="h",
        y=[_name(line) for line in bars],
        x=[line.step_ms_median for line in bars],
        marker_color=[_COLOURS[line.system] for line in bars],
        text=[f"{line.step_ms_median:.0f}" for line in bars],
        textposition="inside",
        insidetextanchor="start",
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [line.step_ms_p95 - line.step_ms_median for line in bars],
            "color": "#6b7280",
            "thickness": 1,
            "width": 3,
        },
        showlegend=False,
    )
    _add_floors(figure, lines)
    return figure


def _add_floors(figure: go.Figure, lines: Sequence[Line]) -> None:
    """A dashed line a floor; its name stands above the bars, the lower ones' a row higher."""
    floors = sorted((line for line in lines if line.system == FLOOR), key=lambda line: -line.step_ms_median)
    for row, floor in enumerate(floors):
        figure.add_vline(x=floor.step_ms_median, line_dash="dash", line_width=1.5, line_color=_COLOURS[FLOOR])
        figure.add_annotation(
            x=floor.step_ms_median,
            y=1,
            yref="paper",
            yshift=13 + 15 * row,
            xanchor="left",
            showarrow=False,
            text=f"products: {floor.setting}, {floor.step_ms_median:.0f} ms",
            font={"size": 11, "color": "#374151"},
        )
    figure.update_layout(margin_t=20 + 15 * len(floors), height=figure.layout.height + 15 * len(floors))


def _memory_chart(lines: Sequence[Line]) -> go.Figure:
    figure = _figure("MiB", len(lines), thickness=44)
    names = [_name(line) for line in lines]
    for kind, colour, sizes in (
        ("total", "#cbd5e1", [line.peak_total_mb for line in lines]),
        ("private", "#0f766e", [line.peak_private_mb for line in lines]),
    ):
        texts = ["" if size is None else f"{size:,.0f}" for size in sizes]
        figure.add_bar(
            orientation="h", y=names, x=sizes, name=kind, marker_color=colour, text=texts, textposition="auto"
        )
    figure.update_layout(barmode="group", margin_t=40, legend_traceorder="reversed")
    return figure


def _alive_chart(lines: Sequence[Line]) -> go.Figure:
    figure = _figure("", 0)
    figure.update_layout(yaxis={"title": "milliseconds a step", "rangemode": "tozero"}, xaxis_automargin=True)
    figure.update_xaxes(title="part of the factors that is alive", tickformat=".0%", range=[0, 1.04])
    shown = _distinct((line.system, line.setting, line.amx) for line in lines)
    figure.update_layout(height=400 + 20 * len(shown))  # the legend stands above, and takes from the height
    dashes = ("solid", "dot", "dash", "dashdot", "longdash", "longdashdot")
    seen: dict[tuple[str, str], int] = {}
    for system, setting, amx in shown:
        mine = [line for line in lines if (line.system, line.setting, line.amx) == (system, setting, amx)]
        chosen = parse_setting(setting)
        if len(mine) < 2 and chosen.lower == "computed":  # what is remembered has no row with all alive
            continue
        style = seen[system, chosen.products] = seen.get((system, chosen.products), -1) + 1
        top = sorted((line for line in mine if _is_part(line.pattern)), key=lambda line: line.alive)
        line_style = {"color": _COLOURS[system], "dash": dashes[style % len(dashes)]}
        name = f"{system}: {setting}{', AMX off' if amx == 'off' else ''}"
        figure.add_scatter(
            x=[line.alive for line in top],
            y=[line.step_ms_median for line in top],
            mode="lines+markers",
            name=name,
            legendgroup=name,
            line=line_style,
            marker_symbol=_SYMBOLS[chosen.products, chosen.lower],
        )
        others = [line for line in mine if not _is_part(line.pattern)]
        figure.add_scatter(
            x=[line.alive for line in others],
            y=[line.step_ms_median for line in others],
            mode="markers+text",
            text=[line.pattern for line in others],
            textposition="middle right",
            textfont={"size": 10, "color": "#374151"},
            legendgroup=name,
            showlegend=False,
            marker={"symbol": "circle-open", "size": 9, "color": _COLOURS[system]},
        )
    return figure


def _is_part(pattern: str) -> bool:
    return pattern[0].isdigit()


def _name(line: Line) -> str:
    return f"{line.system}  <span style='color:#6b7280'>{html.escape(how(line))}</span>"


def _table(rows: Sequence[Line], lines: Sequence[Line]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
    body = "".join(_row(line, lines) for line in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _row(line: Line, lines: Sequence[Line]) -> str:
    share = share_of_whole(line, lines)
    saved = "" if share is None else f" ({share:.2f} × all alive)"
    manner = how(line) if line.pattern == WHOLE else f"{line.pattern} alive: {how(line)}{saved}"
    figures = ["–" if ratio is None else f"{ratio:.2f}" for ratio in ratios(line, lines)]
    cells = [line.system, manner, *measured(line), *figures]
    kind = " class=ours" if line.system.startswith("emberlora") else ""
    return f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _figure(x: str, bars: int, *, thickness: int = 30) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=90 + thickness * bars,
        margin={"l": 10, "r": 20, "t": 20, "b": 45},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        xaxis={"title": x, "tickformat": ","},
        yaxis={"automargin": True, "ticksuffix": "  ", "autorange": "reversed" if bars else None},
        bargap=0.25,
    )
    return figure


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
