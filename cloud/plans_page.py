"""The plan log as one HTML file that needs no network: modules × rounds, and how each round cooled and cost."""

from __future__ import annotations

import html
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import plotly.graph_objects as go

from cloud.planlog import ModuleLog, RoundLog, share_of_movement

_DEAD, _LIVING = "#e5e7eb", ["#bfdbfe", "#3b82f6", "#1e3a8a"]
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111827; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p { color: #4b5563; margin: .2rem 0 .8rem }
"""
_PART = 0.9  # of a round's movement, whose makers are counted


def write_plans_page(path: Path, task: str, rounds: Sequence[RoundLog]) -> None:
    """Write the page; ``rounds`` has one that trains or more."""
    path.write_text(plans_page(task, rounds), encoding="utf-8")


def plans_page(task: str, rounds: Sequence[RoundLog]) -> str:
    """The whole page; plotly's script stands in it once."""
    trained = [round_ for round_ in rounds if round_.state == "train"]
    sections = [
        (
            "What was trained",
            "Rank that was trained, by module from the bottom of the model up; grey is dead: not trained, not sent.",
            life_map(trained),
        ),
        ("How much it moved", _movement_note(trained), movement_map(trained)),
        (
            "How it cooled, and what an update cost",
            "Bytes before sealing, the same for every device.",
            _cooling(trained),
        ),
    ]
    drawn = "".join(
        f"<h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>"
        + figure.to_html(full_html=False, include_plotlyjs=number == 0, config={"displayModeBar": False})
        for number, (title, note, figure) in enumerate(sections)
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>EmberLoRA: plans of {html.escape(task)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Plans of {html.escape(task)}</h1>{drawn}</body></html>\n"
    )


def life_map(rounds: Sequence[RoundLog]) -> go.Figure:
    """Modules × rounds: the trained rank, dead ones grey, the alive factor written in."""
    highest = max(module.trained for round_ in rounds for module in round_.modules) or 1
    share = 1 / (highest + 1)  # the lowest colour is of 0 alone
    scale = [[0.0, _DEAD], [share * 0.99, _DEAD], *([share + (1 - share) * i / 2, _LIVING[i]] for i in range(3))]
    return _map(
        rounds,
        lambda module: module.trained,
        {"colorscale": scale, "zmin": 0, "zmax": highest, "colorbar": {"title": "rank", "dtick": 1}},
        lambda module: module.alive,
    )


def movement_map(rounds: Sequence[RoundLog]) -> go.Figure:
    """Modules × rounds: how much each module moved, as a share of the one that moved most in its round."""
    most = {round_.round: max((module.moved or 0.0 for module in round_.modules), default=0.0) for round_ in rounds}
    ended = [round_ for round_ in rounds if most[round_.round] > 0]
    values = [
        [(round_.modules[row].moved or 0.0) / most[round_.round] for round_ in ended]
        for row in range(len(_columns(ended)))
    ]
    colours = {"colorscale": "Viridis", "zmin": 0, "zmax": 1, "colorbar": {"title": "share"}}
    return _heatmap(ended, values, colours, lambda _: "")


def _columns(rounds: Sequence[RoundLog]) -> Sequence[ModuleLog]:
    return rounds[0].modules if rounds else ()


def _map(
    rounds: Sequence[RoundLog],
    value: Callable[[ModuleLog], float],
    colours: dict[str, object],
    text: Callable[[ModuleLog], str],
) -> go.Figure:
    values = [[value(round_.modules[row]) for round_ in rounds] for row in range(len(_columns(rounds)))]
    return _heatmap(rounds, values, colours, text)


def _heatmap(
    rounds: Sequence[RoundLog],
    values: list[list[float]],
    colours: dict[str, object],
    text: Callable[[ModuleLog], str],
) -> go.Figure:
    rows = range(len(_columns(rounds)))
    figure = go.Figure()
    figure.add_heatmap(
        x=[round_.round for round_ in rounds],
        y=[short_name(module) for module in _columns(rounds)],
        z=values,
        text=[[text(round_.modules[row]) for round_ in rounds] for row in rows],
        texttemplate="%{text}",
        customdata=[[_hover(round_.modules[row]) for round_ in rounds] for row in rows],
        hovertemplate="round %{x}, %{y}<br>%{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
        **colours,
    )
    figure.update_xaxes(title="round", dtick=max(1, len(rounds) // 15))
    figure.update_yaxes(dtick=1)
    figure.update_layout(
        template="plotly_white", height=160 + 16 * len(rows), margin={"l": 10, "r": 10, "t": 10, "b": 45}
    )
    return figure


def short_name(module: ModuleLog) -> str:
    """Block and slot: shorter than the whole name, and as distinct."""
    return f"{module.block} {module.slot}"


def _hover(module: ModuleLog) -> str:
    score = "none yet" if module.score is None else f"{module.score:.3f}"
    moved = "not known yet" if module.moved is None else f"{module.moved:.4g}"
    life = f"{module.alive}, {module.trained} of rank {module.rank}" if module.alive else f"dead at rank {module.rank}"
    return f"{life}<br>score {score}<br>moved {moved}<br>{module.bytes:,} bytes"


def _movement_note(rounds: Sequence[RoundLog]) -> str:
    shares = [share for share in (share_of_movement(round_, _PART) for round_ in rounds) if share is not None]
    note = "Change of what a module adds to its layer, as a share of the one that moved most in the round."
    if shares:
        note += (
            f" In the median round, {statistics.median(shares):.0%} of all modules made {_PART:.0%} of the movement."
        )
    return note


def _cooling(rounds: Sequence[RoundLog]) -> go.Figure:
    figure = go.Figure()
    x = [round_.round for round_ in rounds]
    figure.add_bar(x=x, y=[round_.update_bytes for round_ in rounds], name="bytes of an update", marker_color="#93c5fd")
    lines: dict[str, list[float | None]] = {
        "temperature": [round_.temperature for round_ in rounds],
        "budget, share of the adapter": [round_.budget_share for round_ in rounds],
        "alive, share of the modules": [round_.alive / len(round_.modules) for round_ in rounds],
    }
    for name, values in lines.items():
        if any(value is not None for value in values):
            figure.add_scatter(x=x, y=values, name=name, mode="lines+markers", marker_size=4, yaxis="y2")
    figure.update_layout(
        template="plotly_white",
        height=380,
        margin={"l": 10, "r": 10, "t": 40, "b": 45},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        yaxis={"title": "bytes"},
        yaxis2={"overlaying": "y", "side": "right", "range": [0, 1.05], "showgrid": False},
        xaxis_title="round",
    )
    return figure
