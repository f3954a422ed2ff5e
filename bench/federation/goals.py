"""What was to be shown, and what the lines say of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.federation.equal_bytes import rivals_of
from bench.federation.ingredients import Ingredient
from bench.federation.lines import Line
from bench.federation.methods import FULL_MODEL
from bench.federation.summary import REFERENCE, Name, Row, place_of, rows_of, shared_by_all
from bench.federation.variants import OURS

LOST, BYTES, VALUES, COMPUTE, FEWER = 0.005, 40, 8, 0.5, 0.999


@dataclass(frozen=True)
class Goal:
    """One of them; ``met`` by the means, whatever their intervals."""

    text: str
    measured: str
    met: bool


def goals_of(core: Sequence[Line], others: Sequence[Line], ingredients: Sequence[Ingredient]) -> list[Goal]:
    """Those of classifiers that there are lines for.

    Args:
        core: Of the core table.
        others: With one seed.
        ingredients: Among them those of ``annealed-kill-revive``.
    """
    rows = {row.name: row for row in rows_of(shared_by_all(core), None)}
    ours = [row for (method, _, _), row in rows.items() if method == OURS]
    reference = rows.get((REFERENCE, "", ""))
    found = list(_beside_reference(ours, reference)) if ours and reference else []
    return [
        *found,
        *_at_equal_bytes(core, [row.name for row in ours]),
        *_beside_the_whole_model(core, others),
        *_drift(ingredients),
    ]


def _beside_reference(ours: Sequence[Row], reference: Row) -> Iterator[Goal]:
    def judged(text: str, part: Sequence[tuple[Row, str, bool]]) -> Goal:
        told = "; ".join(f"{row.name[1]} {_apart(row):+.4f} {said}" for row, said, _ in part)
        return Goal(text, told, any(_apart(row) >= -LOST and enough for row, _, enough in part))

    near = f"accuracy within {LOST} of `{REFERENCE}`"
    yield judged(
        f"{near} with at most 1/{BYTES} of its bytes",
        [(row, f"with 1/{row.bytes_ratio or 0:.0f}", (row.bytes_ratio or 0) >= BYTES) for row in ours],
    )
    yield judged(
        f"{near} with at most 1/{VALUES} of its values",
        [(row, f"with 1/{row.params_ratio or 0:.1f}", (row.params_ratio or 0) >= VALUES) for row in ours],
    )
    yield judged(
        f"{near} with at most {COMPUTE} of its compute",
        [(row, f"with {row.compute or 1:.2f}", (row.compute or 1) <= COMPUTE) for row in ours],
    )
    rounds = [(row.name[1], row.rounds_to_95) for row in ours]
    bar = reference.rounds_to_95
    yield Goal(
        f"no more rounds to 95 % than `{REFERENCE}`",
        "; ".join(f"{size} {'–' if found is None else f'{found:.1f}'}" for size, found in rounds)
        + f"; `{REFERENCE}` {'–' if bar is None else f'{bar:.1f}'}",
        bar is not None and any(found is not None and found <= bar for _, found in rounds),
    )


def _apart(row: Row) -> float:
    """NaN without the reference, which is near nothing."""
    return math.nan if row.apart is None else row.apart


def _at_equal_bytes(core: Sequence[Line], names: Sequence[Name]) -> Iterator[Goal]:
    for name in names:
        others = [rival for rival in rivals_of(core, name) if rival.name[0] != OURS]
        if not others:
            continue
        best = max(others, key=lambda rival: rival.apart)
        half = "" if best.apart_95 is None else f" ± {best.apart_95:.4f}"
        yield Goal(
            f"at the bytes of `{OURS}` {name[1]}, no other method better beyond its 95 % interval",
            f"the best of them, `{best.name[0]}`: {best.apart:+.4f}{half}",
            all(rival.apart <= (rival.apart_95 or 0.0) for rival in others),
        )


def _beside_the_whole_model(core: Sequence[Line], others: Sequence[Line]) -> Iterator[Goal]:
    whole = next((line for line in others if line.method == FULL_MODEL and not line.without), None)
    if whole is None:
        return
    mine = [line for line in core if line.method == OURS and place_of(line) == place_of(whole)]
    fewer = [(line.budget, 1 - line.bytes_both / whole.bytes_both) for line in mine]
    if fewer:
        told = "; ".join(f"{size} {share:.2%}" for size, share in fewer)
        yield Goal(f"{FEWER:.1%} fewer bytes than `{FULL_MODEL}`", told, all(share >= FEWER for _, share in fewer))


def _drift(ingredients: Sequence[Ingredient]) -> Iterator[Goal]:
    without = next((found for found in ingredients if found.line.without == "initiating"), None)
    pulled = next((found.line.drift for found in ingredients if found.line.without == "free-start"), None)
    if without is None or without.line.drift is None or without.whole.drift is None:
        return
    told = f"{without.whole.drift:.2f} with, {without.line.drift:.2f} without" + (
        "" if pulled is None else f", {pulled:.2f} with the pull towards the round's start"
    )
    yield Goal("less client drift with the initiating stage", told, without.whole.drift < without.line.drift)
