"""``python -m bench.outliers``: how far honest devices are from each other, and what a rule finds of others."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import click
import msgspec

from bench.federation.lines import Key
from bench.federation.methods import METHODS, Table, resolved
from bench.federation.running import Bench, ensure_bundle
from bench.federation.shares import Sizes
from bench.federation.site import Setup
from bench.federation.workloads import WORKLOADS
from bench.jsonl import append_line
from bench.outliers.measuring import Asked, measure

DATASETS = ("clinc150", "banking77")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True, help="Folder of data sets."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/bench-outliers"), show_default=True)
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path("bench/results/outliers.jsonl"), show_default=True
)
@click.option("--dataset", type=click.Choice(DATASETS), default="clinc150", show_default=True)
@click.option("--alpha", type=float, default=0.1, show_default=True, help="Of the Dirichlet split.")
@click.option("--seed", type=click.IntRange(0), default=9, show_default=True)
@click.option("--method", type=click.Choice(list(METHODS)), default="annealed-kill-revive", show_default=True)
@click.option("--budget", default="small", show_default=True, help="Of a method with several.")
@click.option("--rounds", type=click.IntRange(1), default=8, show_default=True)
@click.option("--examples", type=click.IntRange(1), default=4_000, show_default=True, help="Of all devices together.")
@click.option(
    "--spread",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Sigma of the log-normal distribution of their amounts; 0: as the split makes them.",
)
@click.option("--steps", type=click.IntRange(1), help="Of a device and round.  [default: once over its data]")
@click.option("--draws", type=click.IntRange(1), default=60, show_default=True, help="Of who is hostile, a round.")
def main(data: Path, out: Path, results: Path, budget: str, draws: int, **asked: object) -> None:
    """Train with 20 devices, all of them in every round, and ask what a rule of outliers would have said.

    Of the honest updates it says how large they are and how much they agree; then 2 of the 20 are turned around, or
    made a hundred times as large, and it says which bounds find them and which honest devices go with them. The line
    is appended to RESULTS. The rule and its defaults are those of docs/adr/0024.

    \b
    Examples:
      python -m bench.outliers --data data --method rolora-r8
      python -m bench.outliers --data data --examples 15000 --spread 1.2
    """
    method = METHODS[str(asked["method"])]
    run = msgspec.convert(
        {**asked, "budget": budget if budget in method.budgets else next(iter(method.budgets))}, Asked
    )
    bench = Bench(data, out, threads=1, products="exact")
    ensure_bundle(run.dataset, bench)
    line = asyncio.run(measure(run, _setup(run, bench), draws=draws, say=lambda text: click.echo(text, err=True)))
    click.echo(append_line(results, line))


def _setup(run: Asked, bench: Bench) -> Setup:
    folder = bench.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    workload = WORKLOADS[run.dataset]
    training: Table = {} if run.steps is None else {"steps": run.steps, "epochs": None}
    return Setup(
        key=Key(run.dataset, run.alpha, run.seed, run.method, run.budget, "", False),
        data=str(bench.data),
        bundle=str(bench.out / "bundles" / run.dataset),
        folder=str(folder),
        sizes=Sizes(
            devices=20, cohort=20, rounds=run.rounds, examples=run.examples, glimpse=1, every=1, spread=run.spread
        ),
        threads=bench.threads,
        products=bench.products,
        extra=resolved({"training": training}, workload.reference_bytes),
    )


if __name__ == "__main__":
    main()
