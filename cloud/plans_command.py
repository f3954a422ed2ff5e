"""What ``emberlora cloud plans`` prints: a line a round, or a line a module of one round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from cloud.config import Config
from cloud.errors import DataMissingError
from cloud.kept import read_kept
from cloud.planlog import ModuleLog, RoundLog, plan_log
from cloud.plans_page import short_name, write_plans_page


async def show_plans(config: Config, wanted: int | None, page: Path | None, *, as_json: bool) -> list[str]:
    """The lines to print; writes ``page`` where it is asked for.

    Args:
        config: Of the task.
        wanted: Only this round, module by module; None: all rounds.
        page: HTML file to write.
        as_json: A JSON object a round.

    Raises:
        DataError: there is no such round, or see :func:`cloud.kept.read_kept`.
    """
    rounds = plan_log(config, await read_kept(config))
    if page is not None:
        if not any(round_.state == "train" for round_ in rounds):
            raise DataMissingError(f"{config.data_path}: no round of this task trains yet, so there is nothing to draw")
        write_plans_page(page, config.task.name, rounds)
    chosen = [round_ for round_ in rounds if wanted in (None, round_.round)]
    if not chosen:
        raise DataMissingError(f"round {wanted}: not among the rounds of this task, 0 to {rounds[-1].round}")
    if as_json:
        return [msgspec.json.encode(round_).decode() for round_ in chosen]
    return list(_round_lines(chosen) if wanted is None else _module_lines(chosen[0]))


def _round_lines(rounds: list[RoundLog]) -> Iterator[str]:
    yield f"{'round':>5} {'alive':>9} {'rank':>6} {'temperature':>12} {'budget':>7} {'update bytes':>13}  most moved"
    for round_ in rounds:
        if round_.state == "measure":
            yield f"{round_.round:>5} measures class means, {round_.update_bytes:,} bytes an update"
            continue
        ranks = {module.trained for module in round_.modules if module.alive} or {0}
        spread = str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)}–{max(ranks)}"
        moved = max(round_.modules, key=lambda module: module.moved or 0.0)
        yield (
            f"{round_.round:>5} {f'{round_.alive}/{len(round_.modules)}':>9} {spread:>6} "
            f"{_number(round_.temperature, '.3f'):>12} {_number(round_.budget_share, '.2f'):>7} "
            f"{round_.update_bytes:>13,}  {short_name(moved) if moved.moved else '–'}"
        )


def _module_lines(round_: RoundLog) -> Iterator[str]:
    yield f"{'alive':>5} {'trained':>8} {'rank':>5} {'score':>8} {'moved':>10} {'bytes':>9}  module"
    for module in round_.modules:
        yield _module_line(module)


def _module_line(module: ModuleLog) -> str:
    return (
        f"{module.alive or '–':>5} {module.trained:>8} {module.rank:>5} {_number(module.score, '.3f'):>8} "
        f"{_number(module.moved, '.4g'):>10} {module.bytes:>9,}  {module.name}"
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
