"""Policy ``annealed-kill-revive``: one cooling sets the budget and the chance of revival."""

from __future__ import annotations

from cloud.planner.annealing import budget_share, temperature
from cloud.planner.choice import Choice, Situation
from cloud.planner.kill_revive import choose_lives


def annealed_kill_revive(situation: Situation) -> Choice:
    """As ``kill-revive``, with the budget and the temperature of the round."""
    settings, round_, rounds = situation.annealing, situation.round, situation.rounds
    return choose_lives(
        situation, lambda later: budget_share(settings, later, rounds), temperature(settings, round_, rounds)
    )
