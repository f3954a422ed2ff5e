"""``emberlora edge rules``: when this device may train, shown beside what is the case now, or changed."""

from __future__ import annotations

import re
import time
from pathlib import Path

import click
import msgspec

from edge_runtime.device.commands import home_option, json_option, one_line
from edge_runtime.device.conditions import conditions
from edge_runtime.device.eligibility import Conditions, Obstacle, Rules, obstacles, rest_left, unknown
from edge_runtime.device.home import Home

OFF = "off"
_MOST = 1e9
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _number(_context: click.Context, _option: click.Parameter, value: str | None) -> float | str | None:
    """A number above 0, or "off"."""
    if value is None or value == OFF:
        return value
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < _MOST:
        raise click.BadParameter(f"expected a number above 0, or {OFF}; got {value!r}")
    return number


def _seconds(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    """A time such as 90s, 15m, 6h, 1d; 0 for "off"."""
    if value is None or value == OFF:
        return None if value is None else 0.0
    found = re.fullmatch(r"(\d{1,6})([smhd])", value)
    if not found:
        raise click.BadParameter(f"expected a number with s, m, h or d, for example 6h, or {OFF}; got {value!r}")
    return float(int(found[1]) * _UNITS[found[2]])


class RulesReport(msgspec.Struct, frozen=True):
    """What ``rules --json`` prints."""

    rules: Rules
    on_power: bool | None  # None: this system does not tell, as below
    temperature_c: float | None
    free_mb: int | None
    rest_left_s: float
    may_train: bool
    obstacles: tuple[Obstacle, ...]
    without_effect: tuple[str, ...]


@click.command()
@home_option
@click.option("--on-power/--on-battery-too", default=None, help="Train only while the device does not run on battery.")
@click.option(
    "--max-temperature", callback=_number, metavar="C", help="Train only while its processor is at most so hot."
)
@click.option("--min-free-mb", callback=_number, metavar="MB", help="Train only while so much memory is free, in MiB.")
@click.option("--rest", callback=_seconds, metavar="TIME", help="Pause after an update that counted: 90s, 15m, 6h, 1d.")
@json_option
def rules(
    *,
    home: Path,
    on_power: bool | None,
    max_temperature: float | str | None,
    min_free_mb: float | str | None,
    rest: float | None,
    as_json: bool,
) -> None:
    """Say when this device may train; without options, show the rules and what is the case now.

    They are held against power, temperature and memory before a round and about every 15 seconds while it trains. A
    training that is held keeps its place, gives its memory back, and goes on when the rules are met. A device that
    runs takes up changes by itself. 'off' ends a rule. The server is told nothing of this.

    \b
    Example:
      emberlora edge rules --on-power --max-temperature 75 --rest 6h
      emberlora edge rules --max-temperature off
      emberlora edge rules --json | jq .may_train
    """
    asked = {
        "on_power": on_power,
        "max_temperature_c": max_temperature,
        "min_free_mb": int(min_free_mb) if isinstance(min_free_mb, float) else min_free_mb,
        "rest_s": rest,
    }
    with one_line():
        place = Home(home)
        place.membership()
        settings = place.settings()
        changes = {name: None if value == OFF else value for name, value in asked.items() if value is not None}
        if changes:
            settings = msgspec.structs.replace(settings, rules=msgspec.structs.replace(settings.rules, **changes))
            place.save_settings(settings)
        report = _report(settings.rules, conditions(), counted_at=place.state().counted_at)
    click.echo(msgspec.json.encode(report) if as_json else _text(report))


def _report(rules: Rules, now: Conditions, *, counted_at: float) -> RulesReport:
    found = obstacles(rules, now)
    left_s = rest_left(rules, counted_at=counted_at, now=time.time())
    return RulesReport(
        rules=rules,
        on_power=now.on_power,
        temperature_c=now.temperature_c,
        free_mb=now.free_mb,
        rest_left_s=left_s,
        may_train=not found and left_s <= 0,
        obstacles=found,
        without_effect=unknown(rules, now),
    )


def _text(report: RulesReport) -> str:
    from edge_runtime.device.display import duration

    wanted, silent = report.rules, "this system does not tell"
    power = silent if report.on_power is None else "on mains" if report.on_power else "on battery"
    heat = silent if report.temperature_c is None else f"{report.temperature_c:.0f} °C"
    memory = silent if report.free_mb is None else f"{report.free_mb:,} MiB free"
    rest = f"for {duration(report.rest_left_s)} more" if report.rest_left_s > 0 else ""
    rows = (
        ("power", "mains only" if wanted.on_power else "any", power),
        ("temperature", _bound(wanted.max_temperature_c, "at most", "°C"), heat),
        ("memory", _bound(wanted.min_free_mb, "at least", "MiB"), memory),
        ("rest", f"{duration(wanted.rest_s)} after an update" if wanted.rest_s else "none", rest),
    )
    lines = [f"{name:<12} {rule:<24} {now}".rstrip() for name, rule, now in rows]
    lines.append("this device may train now" if report.may_train else "this device may not train now")
    return "\n".join([*lines, *report.without_effect])


def _bound(value: float | None, what: str, unit: str) -> str:
    return "any" if value is None else f"{what} {value:,.0f} {unit}"
