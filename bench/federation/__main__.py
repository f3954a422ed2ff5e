"""``python -m bench.federation``: which runs are asked for, and with what settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import click
import msgspec

from bench.errors import RequestError
from bench.federation.lines import Key
from bench.federation.methods import CORE, METHODS, Table
from bench.federation.running import Bench, Run, complete
from bench.federation.variants import OURS, VARIANTS, VARIED, variant_run
from bench.federation.variants import one_seed as one_seed_runs
from bench.federation.workloads import NATURAL, WORKLOADS
from edge_runtime.wire import Products

QUICK_DATASET = "banking77"
QUICK = ("lora-r8", "rolora-r8", "annealed-kill-revive")
QUICK_BUDGETS = ("", "small", "half")  # four rows with these


@dataclass(frozen=True)
class Choice:
    """What was asked for by name; an empty tuple leaves it to the data set."""

    datasets: tuple[str, ...] = ()
    alphas: tuple[float | None, ...] = ()
    methods: tuple[str, ...] = ()
    budgets: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


def keys_of(choice: Choice, without: str, *, quick: bool) -> list[Key]:
    """The runs that were asked for, seed after seed: what is interrupted can be compared.

    Raises:
        RequestError: a data set that was named has no such split or method, or no method has such a budget.
    """
    methods = choice.methods or (QUICK if quick else CORE)
    datasets = choice.datasets or ((QUICK_DATASET,) if quick else _fitting(choice.alphas, methods))
    found = []
    for dataset in datasets:
        workload = WORKLOADS[dataset]
        few = slice(1) if quick else slice(None)
        for seed, alpha, method in product(
            choice.seeds or workload.seeds[few], choice.alphas or workload.alphas[few], methods
        ):
            if refusal := workload.refusal(method, alpha):
                raise RequestError(f"{dataset}: {refusal}")
            every = METHODS[method].budgets
            wanted = choice.budgets or (QUICK_BUDGETS if quick else tuple(every))
            budgets = [budget for budget in every if budget in wanted]
            found += [Key(dataset, alpha, seed, method, budget, without, quick) for budget in budgets]
    if not found:
        raise RequestError(f"--budget {' '.join(choice.budgets)}: none of the methods has such a size")
    return sorted(found, key=lambda key: key.seed)


def _fitting(alphas: Sequence[float | None], methods: Sequence[str]) -> list[str]:
    """Data sets that have all of these."""
    return [
        name
        for name, workload in WORKLOADS.items()
        if not any(workload.refusal(method, alpha) for method in methods for alpha in alphas or workload.alphas)
    ]


_VARIANTS = "\b\nVariants, by what they go without:\n" + "\n".join(
    f"  {name:<15} {variant.about}" for name, variant in VARIANTS.items()
)


class _Alpha(click.ParamType[float | None]):
    name = "text"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        try:
            return None if value == NATURAL else float(str(value))
        except ValueError:
            self.fail(f"expected a number or {NATURAL}, got {value}", param, ctx)


@click.command(epilog=_VARIANTS)
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Folder of data sets."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench-federation"), show_default=True)
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path("bench/results/federation.jsonl"), show_default=True
)
@click.option(
    "--dataset", "datasets", type=click.Choice(list(WORKLOADS)), multiple=True, help="[default: all that fit]"
)
@click.option(
    "--alpha",
    "alphas",
    type=_Alpha(),
    multiple=True,
    help=f"Of the split, or {NATURAL}.  [default: 0.5 0.1; shakespeare: {NATURAL}]",
)
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, help="[default: the core table]")
@click.option("--budget", "budgets", multiple=True, help="Of a method with several.  [default: all]")
@click.option("--seed", "seeds", type=click.IntRange(0), multiple=True, help="[default: 0 1 2; shakespeare: 0]")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of one run.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Runs at once.")
@click.option("--products", type=click.Choice(["exact", "int8"]), default="exact", show_default=True)
@click.option("--set", "settings", multiple=True, help="table.key=value in JSON, over the method's config: to try out.")
@click.option(
    "--tier",
    "tiers",
    type=click.IntRange(0),
    multiple=True,
    help="That devices take, in turn; the method needs tiers, by --set.  [default: 0]",
)
@click.option(
    "--without",
    default="",
    help="A variant, see below; or, beside --set, a name for what that changes.",
)
@click.option(
    "--one-seed", is_flag=True, help="In place of the core table: all variants, other methods and splits of CLINC150."
)
@click.option("--quick", is_flag=True, help="One seed, one split, fewer rounds.")
def main(
    data: Path,
    out: Path,
    results: Path,
    datasets: tuple[str, ...],
    alphas: tuple[float | None, ...],
    methods: tuple[str, ...],
    budgets: tuple[str, ...],
    seeds: tuple[int, ...],
    threads: int,
    jobs: int,
    products: Products,
    settings: tuple[str, ...],
    tiers: tuple[int, ...],
    without: str,
    one_seed: bool,
    quick: bool,
) -> None:
    """Let methods learn the same with the same devices, and count what they send and compute.

    MiniLM learns classes: 4,000 texts over 20 devices, 5 a round, 30 rounds. SmolLM2 learns to predict Shakespeare's
    speakers: 20 of them, 20 speeches each, 5 a round, 12 rounds. A run is a JSON line in RESULTS; those that are there
    are not made again, so an interrupted table goes on where it was.

    \b
    Example:
      python -m bench.federation --data data --dataset banking77 --alpha 0.1 --method lora-r8 --seed 0
      python -m bench.federation --data data --one-seed
      python -m bench.federation --data data --dataset clinc150 --method rolora-r8 --without strong-devices
      python -m bench.federation --data data --method rolora-r8 --without half-a-rank --set task.rank=4
    """
    choice = Choice(datasets, alphas, methods, budgets, seeds)
    if one_seed and (choice != Choice() or without or settings or tiers or quick):
        raise click.UsageError("--one-seed: expected no other choice of runs beside it")
    try:
        wanted = (
            one_seed_runs() if one_seed else _wanted(choice, without, Changed(_extra(settings), tiers), quick=quick)
        )
        failed = complete(Bench(data, out, threads, products), wanted, results, jobs)
    except (RequestError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    if failed:
        raise click.ClickException(f"{failed} of {len(wanted)} runs failed: the reasons are above")


@dataclass(frozen=True)
class Changed:
    """What ``--set`` and ``--tier`` change of a method."""

    extra: Mapping[str, Table]
    tiers: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.extra or self.tiers)


def _wanted(choice: Choice, without: str, changed: Changed, *, quick: bool) -> list[Run]:
    if changed and not without:  # its line would pass for one of the method itself
        raise click.UsageError("--set and --tier make a variant: expected --without and a name for it")
    if without and bool(changed) == (without in VARIANTS):
        known = ", ".join(VARIANTS)
        raise click.UsageError(
            f"--without {without}: expected --set or --tier with a new name, or alone one of {known}"
        )
    if without in VARIANTS and not choice.methods:
        choice = replace(choice, methods=(OURS,), budgets=choice.budgets or (VARIED,))
    keys = keys_of(choice, without, quick=quick)
    return [Run(key, changed.extra, changed.tiers or (0,)) if changed else variant_run(key) for key in keys]


def _extra(settings: Sequence[str]) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for text in settings:
        name, separator, value = text.partition("=")
        table, dot, key = name.partition(".")
        if not (separator and dot):
            raise click.UsageError(f"--set {text}: expected table.key=value")
        found.setdefault(table, {})[key] = msgspec.json.decode(value)
    return found


if __name__ == "__main__":
    main()
