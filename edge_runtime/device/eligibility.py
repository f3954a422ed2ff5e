"""When a device may train, by its user's rules: pure decisions, no sensor, clock or disk.

The server learns nothing of the rules or of what they are held against: to it, a device that may not train is one that
is asleep. A rule whose condition the system does not tell holds nobody up, and the user is told so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

RuleName = Literal["power", "temperature", "memory", "rest"]

COOLED_C = 5.0  # a device that was too hot goes on when it is cooler than its bound by so much
ROOMY = 1.25  # one that was short of memory, when it has so many times its bound


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What must be the case for this device to train; without any, it always may.

    Attributes:
        on_power: It must not run on its battery.
        max_temperature_c: Its processor's temperature, in °C, must be at most this.
        min_free_mb: So much memory must be available to programs, in MiB, while it trains as well.
        rest_s: Seconds from an update that counted to the next training.
    """

    on_power: bool = False
    max_temperature_c: Annotated[float, msgspec.Meta(gt=0)] | None = None
    min_free_mb: Annotated[int, msgspec.Meta(gt=0)] | None = None
    rest_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0


@dataclass(frozen=True)
class Conditions:
    """What is the case now; None where the system does not tell.

    Attributes:
        on_power: Whether it runs on mains; also where it has no battery.
        temperature_c: Of its hottest processor, in °C.
        free_mb: Memory that is available to programs, in MiB.
    """

    on_power: bool | None = None
    temperature_c: float | None = None
    free_mb: int | None = None


class Obstacle(msgspec.Struct, frozen=True):
    """A rule that is not met, and a line about it."""

    rule: RuleName
    text: str


def obstacles(rules: Rules, now: Conditions, *, held: bool = False) -> tuple[Obstacle, ...]:
    """The rules that are not met by what is the case; ``rest_s`` is :func:`rest_left`'s.

    Args:
        rules: The user's.
        now: What is the case.
        held: Whether the device was already kept from training: it goes on only when there is some room, so that it
            does not start and stop all the time.
    """
    found = []
    if rules.on_power and now.on_power is False:
        found.append(Obstacle("power", "it runs on its battery"))
    hottest = rules.max_temperature_c
    if hottest is not None and now.temperature_c is not None:
        most = hottest - COOLED_C if held else hottest
        if now.temperature_c > most:
            found.append(Obstacle("temperature", f"it is at {now.temperature_c:.0f} °C: expected at most {most:.0f}"))
    if rules.min_free_mb is not None and now.free_mb is not None:
        least = rules.min_free_mb * (ROOMY if held else 1)
        if now.free_mb < least:
            found.append(Obstacle("memory", f"it has {now.free_mb:,} MiB free: expected at least {least:,.0f}"))
    return tuple(found)


def rest_left(rules: Rules, *, counted_at: float, now: float) -> float:
    """Seconds until the next training may begin, from 0 to the whole rest.

    Args:
        rules: The user's.
        counted_at: When an update of this device counted last, Unix seconds; 0 if none did.
        now: Unix seconds; before ``counted_at`` where a clock was set back, which makes no rest longer than a whole
            one.
    """
    return min(max(0.0, counted_at + rules.rest_s - now), rules.rest_s)


def unknown(rules: Rules, now: Conditions) -> tuple[str, ...]:
    """A line for each rule that has no effect, because the system does not tell what it is about."""
    silent = {
        "power": rules.on_power and now.on_power is None,
        "temperature": rules.max_temperature_c is not None and now.temperature_c is None,
        "memory": rules.min_free_mb is not None and now.free_mb is None,
    }
    names = [name for name in silent if silent[name]]
    return tuple(f"the rule about {name} has no effect: this system does not tell it" for name in names)
