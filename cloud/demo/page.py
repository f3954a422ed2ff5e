"""The report as one HTML file that needs no network: a table of the main figures, then charts drawn with plotly."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from cloud.demo.progress import megabytes
from cloud.demo.record import Report, cumulated, misses
from cloud.plans_page import life_map

_BLUE, _ORANGE, _GREY, _GREEN = "#2563eb", "#ea580c", "#6b7280", "#059669"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111827; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p.note { color: #4b5563; margin: .2rem 0 .8rem } table { border-collapse: collapse; width: 100% }
td, th { padding: .35rem .6rem; border-bottom: 1px solid #e5e7eb; text-align: left; vertical-align: top }
td.figure { font-variant-numeric: tabular-nums; font-weight: 600; white-space: nowrap }
.good { color: #059669 } .bad { color: #dc2626 } .scroll { overflow-x: auto }
"""


def write_page(path: Path, report: Report) -> None:
    """Write ``report.html``."""
    path.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The whole page; plotly's script stands in it once."""
    charts = [
        ("Quality by round", _metric_note(report), _metric_chart(report)),
        ("Traffic, cumulated", _traffic_note(report), _traffic_chart(report)),
        ("Memory of each device", "Highest while training. Total includes weights mapped from disk.", _memory(report)),
        ("Time", "Of each round, and of each device's training in the last one.", _time_chart(report)),
    ]
    if report.plans:
        charts[2:2] = [("What was trained", _plans_note(report), life_map(report.plans))]
    if report.edge_examples:
        charts.append(("Who has what", "Training texts of each device by package.", _holdings_chart(report)))
    sections = "".join(
        f"<h2>{html.escape(title)}</h2><p class=note>{html.escape(note)}</p>"
        + figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displayModeBar": False})
        for number, (title, note, figure) in enumerate(charts)
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>EmberLoRA: {html.escape(report.model)} on {report.devices} devices</title><style>{_STYLE}</style>"
        f"</head><body>{_head(report)}{_table(_main_rows(report))}{sections}"
        f"<h2>How it was run</h2>{_table(_detail_rows(report))}</body></html>\n"
    )


def _head(report: Report) -> str:
    what = "which package a docstring comes from" if report.task == "classify" else "to continue Python source"
    missed = misses(report)
    if report.quick:
        verdict = "<p class=note>A quick run: it shows that everything works, not how well.</p>"
    elif missed:
        verdict = f"<p class=bad>✗ {html.escape('; '.join(missed))}</p>"
    else:
        verdict = "<p class=good>✓ Every figure is within its bounds.</p>"
    return (
        f"<h1>{html.escape(report.model)} learned {what}</h1><p class=note>{report.devices} devices, "
        f"{report.rounds} rounds, {report.run_s:.0f} s; no text left its device.</p>{verdict}"
    )


Rows = Sequence[tuple[str, str, str]]  # what, figure, explanation


def _main_rows(report: Report) -> Rows:
    share = (report.bytes_up + report.bytes_down) / max(report.bytes_full_fedavg, 1)
    rows = [
        (f"{report.metric} before", f"{report.before:.3f}", "the exported adapter, on the devices' held-out texts"),
        (f"{report.metric} after", f"{report.after:.3f}", "the published adapter, on the same texts"),
        ("by torch and peft", f"{report.peft_after:.3f}", "the same adapter and texts, another engine"),
        ("pooled training", f"{report.central:.3f}", "all texts in one place, as many steps as all devices together"),
    ]
    if report.tfidf is not None:
        rows.append(("tf-idf", f"{report.tfidf:.3f}", "with logistic regression on all texts; a yardstick"))
    return [
        *rows,
        ("sent by devices", megabytes(report.bytes_up), "sealed updates"),
        ("sent to devices", megabytes(report.bytes_down), "plans, adapters, and the bundle once"),
        ("of full averaging", f"{share:.1%}", f"FedAvg of every parameter: {megabytes(report.bytes_full_fedavg)}"),
    ]


def _detail_rows(report: Report) -> Rows:
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.phase_s.items())
    return [
        ("texts", f"{report.train_examples} + {report.heldout_examples}", "to train, held out"),
        ("local steps", str(report.local_steps), "optimizer steps of a device in a round"),
        ("parameters", f"{report.parameters:,}", "of the whole model"),
        ("bundle", megabytes(report.bundle_bytes), report.bundle_digest),
        ("seed", str(report.seed), ", ".join(f"{tool} {number}" for tool, number in report.versions.items())),
        ("phases", f"{report.run_s:.0f} s", phases),
    ]


def _table(rows: Rows) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(what)}</td><td class=figure>{html.escape(figure)}</td><td>{html.escape(why)}</td></tr>"
        for what, figure, why in rows
    )
    return f"<div class=scroll><table>{cells}</table></div>"


def _plans_note(report: Report) -> str:
    last = report.plans[-1]
    return (
        "Rank that was trained, by module from the bottom of the model up; grey is dead: not trained, not sent. "
        f"In the last round {last.alive} of {len(last.modules)} modules were alive. A and B are the factor trained."
    )


def _metric_note(report: Report) -> str:
    return f"Mean {report.metric} on the devices' held-out texts after each round; 0 is the exported adapter."


def _metric_chart(report: Report) -> go.Figure:
    figure = _figure("rounds applied", report.metric)
    figure.add_scatter(
        x=list(range(len(report.curve))), y=list(report.curve), mode="lines+markers", name="devices", line_color=_BLUE
    )
    lines = [("pooled training", report.central, _ORANGE), ("before", report.before, _GREY)]
    if report.tfidf is not None:
        lines.append(("tf-idf", report.tfidf, _GREEN))
    for name, value, colour in lines:
        figure.add_scatter(
            x=[0, report.rounds], y=[value, value], mode="lines", name=name, line={"color": colour, "dash": "dash"}
        )
    if report.metric == "accuracy":
        figure.update_yaxes(range=[0, 1])
    figure.update_xaxes(tickformat="d")
    return figure


def _traffic_note(report: Report) -> str:
    full = megabytes(report.bytes_full_fedavg)
    return f"All devices together; the scale is logarithmic. Averaging the full model would move {full}."


def _traffic_chart(report: Report) -> go.Figure:
    figure = _figure("round", "MB")
    series = [
        ("up: updates", cumulated(report.round_bytes_up), _BLUE),
        ("down: bundle and adapters", cumulated(report.round_bytes_down), _ORANGE),
        ("full-model averaging, both ways", _full(report), _GREY),
    ]
    for name, amounts, colour in series:
        rounds = list(range(1, len(amounts) + 1))
        megas = [amount / 1e6 for amount in amounts]
        figure.add_scatter(x=rounds, y=megas, mode="lines+markers", name=name, line_color=colour)
    figure.update_yaxes(type="log")
    figure.update_xaxes(tickformat="d")
    return figure


def _full(report: Report) -> list[int]:
    a_round = report.bytes_full_fedavg // max(report.rounds, 1)
    return [a_round * number for number in range(1, report.rounds + 1)]


def _memory(report: Report) -> go.Figure:
    figure = _figure("", "MB")
    names = _device_names(report)
    figure.add_bar(x=names, y=list(report.edge_peak_private_mb), name="private", marker_color=_BLUE)
    figure.add_bar(x=names, y=list(report.edge_peak_rss_mb), name="total", marker_color=_GREY)
    figure.update_layout(barmode="group")
    return figure


def _time_chart(report: Report) -> go.Figure:
    figure = _figure("", "seconds")
    rounds = [f"round {number}" for number in range(1, len(report.round_s) + 1)]
    figure.add_bar(x=rounds, y=list(report.round_s), name="round", marker_color=_BLUE)
    figure.add_bar(x=_device_names(report), y=list(report.edge_train_s), name="training", marker_color=_ORANGE)
    return figure


def _holdings_chart(report: Report) -> go.Figure:
    figure = _figure("", "texts")
    labels = sorted({label for counts in report.edge_examples.values() for label in counts})
    for label in labels:
        counts = [held.get(label, 0) for held in report.edge_examples.values()]
        figure.add_bar(x=list(report.edge_examples), y=counts, name=label)
    figure.update_layout(barmode="stack")
    return figure


def _device_names(report: Report) -> list[str]:
    return [f"device-{number}" for number in range(1, report.devices + 1)]


def _figure(x: str, y: str) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=340,
        margin={"l": 60, "r": 20, "t": 10, "b": 40},
        legend={"orientation": "h", "y": 1.12},
        xaxis_title=x,
        yaxis_title=y,
    )
    return figure
