"""The report as one HTML file: no script, no network, charts as inline SVG and bars in CSS."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from edge_runtime.benchmark.report import (
    Case,
    Length,
    Measured,
    Operators,
    Report,
    kilobytes,
    matrix_line,
    mebibytes,
    milliseconds,
)

_STYLE = """
:root { --ink: #1f2430; --soft: #5b6472; --line: #e4e7ec; --wash: #f6f7f9; --time: #2f6fdb; --memory: #d9822b;
  --good: #1f8a5b; --bad: #c0392b }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 76rem; margin: 2.5rem auto;
  padding: 0 1.25rem }
h1 { font-size: 1.6rem; margin: 0 0 .2rem } h2 { font-size: 1.2rem; margin: 2.8rem 0 .3rem }
h3 { font-size: .95rem; margin: 1.8rem 0 .3rem }
p { margin: .3rem 0 .8rem; max-width: 52rem } p.note { color: var(--soft) }
p.verdict { background: var(--wash); border-left: 4px solid var(--good); padding: .8rem 1rem;
  border-radius: 0 6px 6px 0 }
p.verdict.none { border-color: var(--bad) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { font-size: .78rem; font-weight: 600; color: var(--soft); text-align: right; vertical-align: bottom }
th, td { padding: .32rem .45rem; border-bottom: 1px solid var(--line); white-space: nowrap }
td { text-align: right } th.left, td.left { text-align: left }
tr.first td { border-top: 2px solid #c9ced6 }
tr.chosen td { background: #eef8f3 } td.failed { color: var(--bad); text-align: left; white-space: normal }
td.bar { min-width: 7.5rem; text-align: left } .bar span { display: inline-block; height: .7rem; border-radius: 2px;
  margin-right: .45rem; vertical-align: -1px; min-width: 1px }
.time span { background: var(--time) } .memory span { background: var(--memory) }
svg { display: block; max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: var(--soft);
  paint-order: stroke; stroke: #fff; stroke-width: 4px }
ul.key { list-style: none; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem }
ul.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .4rem }
"""
_COLOURS = ("#2f6fdb", "#7fa8ea", "#d9822b", "#efb97c", "#1f8a5b", "#82c2a6", "#8757c5", "#c3a7e3")
_REST = "#c9ced6"
_BAR_REM = 3.5  # the longest bar in a cell


def page(report: Report) -> str:
    """The whole page."""
    host = report.host
    memory = f"{int(host['memory_mb'] or 0):,} MiB"
    threads = host["threads"] or host["cores"]
    facts = f"{host['machine']}, {threads} threads, {memory}, onnxruntime {host['onnxruntime']}, {host['system']}"
    quick = "<p class=note>A quick run: three steps a setting. The figures are a first impression.</p>"
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>EmberLoRA on {escape(str(host['device']))}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Training on {escape(str(host['device']))}</h1><p class=note>{escape(facts)}</p>{quick * report.quick}"
        + (_comparison(report.bundles) if len(report.bundles) > 1 else "")
        + "".join(_section(bundle, report) for bundle in report.bundles)
        + "</body></html>\n"
    )


def _comparison(bundles: Sequence[Measured]) -> str:
    """What the verdict says of each bundle, in a row."""
    rows = []
    for bundle in bundles:
        chosen = next((case.figures for case in bundle.cases if case.setting == bundle.verdict.setting), None)
        name = f"<tr><td class=left>{escape(bundle.model)}<td class=left>{bundle.base}"
        if chosen is None:
            rows.append(f"{name}<td class=failed colspan=5>no tier fits")
            continue
        longest = bundle.verdict.longest_tokens
        rows.append(
            f"{name}<td class=left>{bundle.verdict.tier}<td>{milliseconds(chosen.step_ms_p50)}"
            f"<td>{chosen.tokens_per_s:,.0f}"
            f"<td>{chosen.peak_total_mb:,.0f}<td>{'none tried' if longest is None else f'{longest:,}'}"
        )
    headings = (
        "<th class=left>model<th class=left>base<th class=left>tier that fits<th>step, ms (p50)<th>tokens/s"
        "<th>peak memory, MiB<th>longest sequence, tokens"
    )
    table = f"<table><tr>{headings}</tr>{''.join(rows)}</table>"
    return f"<h2>Side by side</h2><p class=note>Each in its verdict's setting.</p><div class=scroll>{table}</div>"


def _section(bundle: Measured, report: Report) -> str:
    what = (
        f"{bundle.parameters / 1e6:,.0f} M parameters in {bundle.blocks} blocks, base {bundle.base}, "
        f"rank {bundle.r_max}. "
        f"A step has {bundle.batch_size} examples of {bundle.tokens} tokens."
    )
    fits = "" if bundle.verdict.tier else " none"
    parts = [
        f"<h2>{escape(bundle.model)}, {bundle.base}</h2><p class=note>{escape(what)}</p>",
        f"<p class='verdict{fits}'>{escape(bundle.verdict.sentence)}</p>",
        _cases(bundle, report),
    ]
    if len([length for length in bundle.lengths if length.peak_total_mb is not None]) > 1:
        parts += [
            "<h3>Memory by sequence length</h3><p class=note>One example, with as little memory as the engine "
            "can do with: peak of the process, mapped weights included.</p>",
            _curve(bundle.lengths, report.memory_budget_mb),
        ]
    if bundle.operators is not None:
        parts += ["<h3>Where a step's time goes</h3>", _operators(bundle.operators)]
    return "".join(parts)


def _cases(bundle: Measured, report: Report) -> str:
    """The settings in rows; bars have one scale for all bundles, so that they can be compared."""
    found = [case.figures for other in report.bundles for case in other.cases if case.figures is not None]
    slowest = max(figures.step_ms_p50 for figures in found)
    largest = max(figures.peak_total_mb for figures in found)
    headings = (
        "<th class=left>alive<th>rank<th class=left>activations<th class=left>products<th class=left>step, ms (p50)"
        "<th>p95<th>tokens/s<th class=left>peak memory, MiB<th>private<th>new plan, ms<th>up, kB<th>down, kB"
    )
    rows, tier = [], ""
    for case in bundle.cases:
        classes = " ".join(
            name
            for name, wanted in (
                ("first", bool(tier) and case.setting.tier != tier),
                ("chosen", case.setting == bundle.verdict.setting),
            )
            if wanted
        )
        rows.append(f"<tr class='{classes}'>{_row(case, bundle.blocks, slowest, largest)}</tr>")
        tier = case.setting.tier
    notes = (
        "Blocks are alive from the top. Bytes are those of one round with both factors alive: the sealed update up, "
        "the adapter down. The verdict's setting is marked."
    )
    return f"<div class=scroll><table><tr>{headings}</tr>{''.join(rows)}</table></div><p class=note>{notes}</p>"


def _row(case: Case, blocks: int, slowest: float, largest: float) -> str:
    setting, found = case.setting, case.figures
    kept = "kept" if setting.memory == "keep" else "recomputed"
    start = (
        f"<td class=left>{setting.blocks_alive} of {blocks}<td>{setting.rank}"
        f"<td class=left>{kept}<td class=left>{setting.products}"
    )
    if found is None:
        return f"{start}<td class=failed colspan=8>{escape(case.failed or '')}"
    return (
        f"{start}<td class='bar time'>{_bar(found.step_ms_p50 / slowest)}{milliseconds(found.step_ms_p50)}"
        f"<td>{milliseconds(found.step_ms_p95)}<td>{found.tokens_per_s:,.0f}"
        f"<td class='bar memory'>{_bar(found.peak_total_mb / largest)}{mebibytes(found.peak_total_mb)}"
        f"<td>{mebibytes(found.peak_private_mb)}<td>{found.plan_change_ms:,.0f}"
        f"<td>{kilobytes(found.update_bytes)}<td>{kilobytes(found.adapter_bytes)}"
    )


def _bar(share: float) -> str:
    return f"<span style='width:{share * _BAR_REM:.2f}rem'></span>"


def _curve(lengths: Sequence[Length], budget_mb: int) -> str:
    """Peak memory over sequence length, with the budget as a line where it is in sight."""
    points = [(length.tokens, length.peak_total_mb) for length in lengths if length.peak_total_mb is not None]
    longest, highest = points[-1][0], max(peak for _, peak in points)
    in_sight = budget_mb <= 1.6 * highest
    top = 1.15 * max(highest, budget_mb if in_sight else 0)
    left, width, height, bottom = 64, 560, 200, 232

    def place(tokens: float, peak: float) -> tuple[float, float]:
        return left + width * tokens / longest, bottom - height * peak / top

    parts = [f"<line x1={left} y1={bottom} x2={left + width} y2={bottom} stroke='#9aa2ae'/>"]
    if in_sight:
        _, y = place(0, budget_mb)
        parts.append(
            f"<line x1={left} y1={y:.1f} x2={left + width} y2={y:.1f} stroke='#c0392b' stroke-dasharray='5 4'/>"
            f"<text x={left + 6} y={y - 6:.1f}>memory budget, {budget_mb:,} MiB</text>"
        )
    path = " ".join("{:.1f},{:.1f}".format(*place(tokens, peak)) for tokens, peak in points)
    parts.append(f"<polyline points='{path}' fill=none stroke='#d9822b' stroke-width=2.5 />")
    for tokens, peak in points:
        x, y = place(tokens, peak)
        parts.append(
            f"<circle cx={x:.1f} cy={y:.1f} r=4 fill='#d9822b'/>"
            f"<text x={x:.1f} y={y - 10:.1f} text-anchor=middle>{peak:,.0f}</text>"
            f"<text x={x:.1f} y={bottom + 18} text-anchor=middle>{tokens:,}</text>"
        )
    parts.append(f"<text x={left - 8} y={bottom - height + 4} text-anchor=end>MiB</text>")
    parts.append(f"<text x={left} y={bottom + 18} text-anchor=middle>tokens</text>")
    return f"<svg viewBox='0 0 660 262' width=660 role=img aria-label='memory by length'>{''.join(parts)}</svg>"


def _operators(operators: Operators) -> str:
    """One bar of shares, its key, and the share of matrix products in a line."""
    shown = operators.operators[: len(_COLOURS)]
    slices = [(found.name, found.ms, found.share, colour) for found, colour in zip(shown, _COLOURS, strict=False)]
    rest = operators.operators[len(_COLOURS) :]
    if rest:
        others = f"{len(rest)} others"
        slices.append((others, sum(found.ms for found in rest), sum(found.share for found in rest), _REST))
    start, parts, key = 0.0, [], []
    for name, ms, share, colour in slices:
        parts.append(f"<rect x={start:.2f} y=0 width={1000 * share:.2f} height=34 fill='{colour}'/>")
        key.append(f"<li><i style='background:{colour}'></i>{escape(name)} {share:.1%} ({ms:.1f} ms)</li>")
        start += 1000 * share
    return (
        f"<p class=note>{escape(matrix_line(operators))} Milliseconds are those of one step.</p>"
        f"<svg viewBox='0 0 1000 34' width=1000 role=img aria-label='time by operator'>{''.join(parts)}</svg>"
        f"<ul class=key>{''.join(key)}</ul>"
    )
