"""What fits a device: a tier fits when a setting of it, exact and at the bundle's rank, keeps two bounds.

Memory: the process's peak, mapped weights included, is within the memory budget. Time: a step takes at most
:data:`STEP_LIMIT_S`. The tier with most alive blocks that fits is the verdict, with its fastest setting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edge_runtime.benchmark.cases import TIERS
from edge_runtime.benchmark.report import Case, Length, Verdict
from edge_runtime.bundle import Manifest

STEP_LIMIT_S = 6.0  # a hundred such steps take the ten minutes an aggregator waits for a round by default
FIRST_TOKENS = 128
# A length is tried only when it should stay within this much of the budget: the default budget is 60 % of the free
# memory, and a device must not be driven out of it.
_TRY_UP_TO = 1.5


def choose(cases: Sequence[Case], *, rank: int, budget_mb: float) -> Case | None:
    """The fastest fitting case of the highest tier that has one; None when nothing fits."""
    for tier in TIERS:
        fitting = [
            (case.figures.step_ms_p50, number)
            for number, case in enumerate(cases)
            if case.figures is not None
            and (case.setting.tier, case.setting.rank, case.setting.products) == (tier, rank, "exact")
            and case.figures.peak_total_mb <= budget_mb
            and case.figures.step_ms_p50 <= 1e3 * STEP_LIMIT_S
        ]
        if fitting:
            return cases[min(fitting)[1]]
    return None


def next_length(tried: Sequence[Length], *, budget_mb: float, last: int) -> int | None:
    """The next length to try: twice the one before, as long as that one fits and the next is no danger.

    Args:
        tried: In ascending order.
        budget_mb: MiB.
        last: The longest to try, in tokens.
    """
    if not tried:
        return min(FIRST_TOKENS, last)
    tokens = tried[-1].tokens
    if tokens >= last or not _fits(tried[-1], budget_mb):
        return None
    following = min(2 * tokens, last)
    growth = _growth(tried)
    expected = (tried[-1].peak_total_mb or 0) + growth * (following**2 - tokens**2)
    return following if expected <= _TRY_UP_TO * budget_mb else None


def longest(tried: Sequence[Length], *, budget_mb: float, limit: int) -> tuple[int | None, bool]:
    """The longest length that fits the budget, and whether it was tried itself.

    Between one that fits and one that does not, memory is taken to grow linearly, beyond the last one with the square
    of the length, as attention does at worst: both err on the safe side. No more than four times the last one is said.
    """
    fitting = [length for length in tried if _fits(length, budget_mb)]
    if not fitting:
        return None, True
    best, peak = fitting[-1].tokens, fitting[-1].peak_total_mb or 0
    if best >= limit:
        return limit, True
    if len(fitting) < len(tried):
        above = tried[len(fitting)]
        if above.peak_total_mb is None:
            return best, True
        share = (budget_mb - peak) / (above.peak_total_mb - peak)
        return best + int(share * (above.tokens - best)), False
    growth = _growth(tried)
    if len(tried) < 2:
        return best, True
    room = math.sqrt(best**2 + (budget_mb - peak) / growth) if growth else math.inf
    return int(min(room, 4 * best, limit)), False


def judge(
    chosen: Case | None, tried: Sequence[Length], manifest: Manifest, *, batch: tuple[int, int], budget_mb: float
) -> Verdict:
    """The verdict in one or two sentences; ``batch`` is (examples, tokens) of the measured step."""
    examples, tokens = batch
    bounds = f"{budget_mb:,.0f} MiB and {STEP_LIMIT_S:g} s a step"
    if chosen is None or chosen.figures is None:
        sentence = f"No tier fits this device within {bounds}: try a base of fewer bits, a shorter or a smaller batch."
        return Verdict(None, None, None, False, sentence)
    setting, figures = chosen.setting, chosen.figures
    limit = manifest.text.max_tokens
    found, was_tried = longest(tried, budget_mb=budget_mb, limit=limit)
    blocks = len(manifest.blocks)
    alive = f"all {blocks} blocks" if setting.tier == "full" else f"the upper {setting.blocks_alive} of {blocks} blocks"
    sentence = (
        f"This device can train {alive} (tier {setting.tier}): {figures.step_ms_p50 / 1e3:.2g} s a step of "
        f"{examples} x {tokens} tokens, {figures.peak_total_mb:,.0f} MiB at its peak, within {bounds}. "
    )
    if found is None:
        sentence += "Even in the setting with least memory, none of the lengths tried fits the budget."
    elif found >= limit:
        how = "" if was_tried else " (estimated)"
        sentence += f"The longest sequence that fits this memory is the model's limit of {limit:,} tokens{how}."
    else:
        how = "tried" if was_tried else f"estimated from {_tokens(tried)} tokens"
        sentence += f"The longest sequence that fits this memory has about {found:,} tokens ({how}); "
        sentence += f"the model's limit is {limit:,}."
    return Verdict(setting.tier, setting, found, was_tried, sentence)


def _fits(length: Length, budget_mb: float) -> bool:
    return length.peak_total_mb is not None and length.peak_total_mb <= budget_mb


def _growth(tried: Sequence[Length]) -> float:
    """MiB for each squared token between the last two lengths; 0 when there are not two, or memory did not grow."""
    if len(tried) < 2 or tried[-1].peak_total_mb is None or tried[-2].peak_total_mb is None:
        return 0.0
    grown = tried[-1].peak_total_mb - tried[-2].peak_total_mb
    return float(max(0.0, grown / (tried[-1].tokens ** 2 - tried[-2].tokens ** 2)))


def _tokens(tried: Sequence[Length]) -> str:
    return " and ".join(str(length.tokens) for length in tried[-2:])
