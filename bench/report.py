"""``python -m bench.report``: results of ``bench.federation`` as ``docs/results.md`` and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from bench.errors import RequestError
from bench.federation.equal_bytes import rivals_of
from bench.federation.goals import goals_of
from bench.federation.ingredients import Ingredient, ingredients_of
from bench.federation.lines import Line, read_lines
from bench.federation.methods import METHODS
from bench.federation.metric import ACCURACY, LOSS, Metric
from bench.federation.picture import write_picture
from bench.federation.summary import LINKS, Name, Row, Split, place_of, rows_of, shared_by_all, split_of, splits_of
from bench.federation.workloads import WORKLOADS

_OURS: tuple[Name, ...] = tuple(("annealed-kill-revive", b, "") for b in METHODS["annealed-kill-revive"].budgets)
_HEAD = (
    "− lora-r8",
    "MB both ways",
    "bytes: lora-r8 is × as many",
    "values: × as many",
    "compute, × lora-r8",
    "rounds to 95 %",
    "drift",
    *(f"minutes at {link.mbit_s:g} Mbit/s" for link in LINKS),
)

_INTRODUCTION = """\
# What a byte teaches

Made by `python -m bench.report` from the lines of `python -m bench.federation` in
[`bench/results`](../bench/results); do not edit by hand.

Bytes are bodies of plans, adapters and updates, headers of our own formats and scales included, both ways together;
the head and the bundle, which every device fetches once, are apart. Every row of a table has the same split, cohorts
and seeds.

*− lora-r8* is the mean difference on the same seeds, with the half width of its 95 % interval (paired Student's t;
with three seeds wide). *Rounds to 95 %* counts until 95 % of what `lora-r8` has at its best. *Drift* is the mean of
‖Δₖ − Δ̄‖ / ‖Δ̄‖. Minutes are computed, not measured: 200 ms round trip and 2 % loss, which bounds TCP to half a Mbit/s
whatever the link (Mathis et al. 1997), and a device of 20 GFLOP/s.
"""

_CLASSES = """\
## Classes of short texts: accuracy against bytes

Twenty devices hold 4,000 training texts, five of them take part in a round, thirty rounds, one pass over a device's
own texts a round in batches of 16; `half` takes 0.49 of them in batches of 8, those likely that teach most
([ADR 31](adr/0031-examples-that-still-teach.md)). MiniLM with LoRA on every linear layer; the head is made of class
means before the first round and stays as it is. Accuracy is that of the last adapter on all test texts. Lines of
`small`, and of its ingredients, are from before patches of differences (ADR 30): their bytes are those of plain codes.

Rates were found for each method on a split of its own (seed 9, Dirichlet 0.1), doubled until accuracy fell;
[ADR 22](adr/0022-low-ranks-want-high-rates-and-both-factors.md) has them.
"""

_LOSSES = """\
## Speakers of Shakespeare: held-out loss against bytes

SmolLM2-135M-Instruct (its weights restored from four bits, then float32) with LoRA on every linear layer of its blocks
learns to predict what a speaker says. Twenty devices are the twenty speakers with the most text; each holds twenty
speeches, cut at 64 tokens; five take part in a round, twelve rounds, one pass over a device's own speeches a round in
batches of four. The last tenth of each speaker's speeches is never trained on. The loss is the mean over all tokens of
the first four of those, in nats: less is better, and a difference below zero is in a method's favour. *Rounds to 95 %*
counts until the loss has fallen by 95 % of what it falls by with `lora-r8` at its best.

Rates are the best of two or three that each method was run with (`lora-a2` with one, after trials on fewer speeches);
[ADR 22](adr/0022-low-ranks-want-high-rates-and-both-factors.md) has them.
"""
_ALL = "Splits and seeds on which every row has a run."
_GOALS = """\
What was to be shown on classes of texts, and the means over all splits and seeds that every row has. A goal beside
`lora-r8` is met when one of the sizes meets it.
"""
_ONE_SEED = """\
## One seed each

What was run once, beside the runs of the core table with the same split, cohorts and seed. Two runs on the same 4,500
texts that differ on one text in 25 have a difference whose standard error is 0.003: less than 0.006 says nothing.
"""
_INGREDIENTS = """\
### What each ingredient gives

`annealed-kill-revive` small with one ingredient turned off, and what happens in its place. *− whole* is accuracy less
that of the whole method; compute is a share of the whole method's, *rounds to 95 %* count until 95 % of what the whole
method has learned at its best. What an ingredient gives is the whole method against the one without it: accuracy from
0.006 on, bytes and compute from 5 %.
"""
_SECTIONS = ((ACCURACY, _CLASSES), (LOSS, _LOSSES))


def markdown(lines: Sequence[Line]) -> str:
    """The page."""
    parts = [_INTRODUCTION]
    core, others = _divided(lines)
    for metric, introduction in _SECTIONS:
        mine = [line for line in core if line.metric == metric]
        parts += [introduction, *_section(mine, metric)] if mine else []
    parts += [_ONE_SEED, *_one_seed(core, others)] if others else []
    parts += _goals(core, others)
    parts.append(f"## Apart\n\n{_apart(lines)}")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _divided(lines: Iterable[Line]) -> tuple[list[Line], list[Line]]:
    """The core table's lines and the others."""
    core: list[Line] = []
    others: list[Line] = []
    for line in lines:
        (core if WORKLOADS[line.dataset].core(line.key) else others).append(line)
    return core, others


def _one_seed(core: Sequence[Line], others: Sequence[Line]) -> list[str]:
    """Other methods and fleets with the core table's runs of the same seed, and ingredients."""
    places = {place_of(line) for line in others}
    beside = [*(line for line in core if place_of(line) in places), *others]
    ingredients = ingredients_of({line.key: line for line in beside})
    mine = {ingredient.line.key for ingredient in ingredients if ingredient.line.without}
    rest = [line for line in beside if line.key not in mine]
    parts = [
        _split_table(rest, split)
        for split in splits_of(rest)
        if any(split_of(line) == split for line in others if line.key not in mine)
    ]
    return parts + ([_ingredients(ingredients)] if mine else [])


def _goals(core: Sequence[Line], others: Sequence[Line]) -> list[str]:
    """What was to be shown on classes of texts, beside what was measured."""
    classes, beside = ([line for line in part if line.metric == ACCURACY] for part in (core, others))
    found = goals_of(classes, beside, ingredients_of({line.key: line for line in (*classes, *beside)}))
    rows = [(goal.text, goal.measured, "met" if goal.met else "**missed**") for goal in found]
    return [f"## Goals\n\n{_GOALS}\n{_table(('goal', 'measured', ''), rows)}"] if rows else []


def _ingredients(ingredients: Sequence[Ingredient]) -> str:
    head = (
        "without",
        "instead",
        "accuracy",
        "− whole",
        "MB",
        "values, M",
        "compute, × whole",
        "drift",
        "rounds to 95 %",
        "so it gives",
    )
    rows = [
        (
            ingredient.line.without or "–",
            ingredient.about or "–",
            f"{ingredient.line.end:.4f}",
            f"{ingredient.apart:+.4f}",
            f"{ingredient.megabytes:.2f}",
            f"{ingredient.values:.2f}",
            f"{ingredient.compute:.2f}",
            _number(ingredient.line.drift, ".2f"),
            _number(ingredient.rounds_to_95, "d"),
            ingredient.gives if ingredient.line.without else "–",
        )
        for ingredient in ingredients
    ]
    return f"{_INGREDIENTS}\n{_table(head, rows)}"


def _section(lines: Sequence[Line], metric: Metric) -> list[str]:
    """Tables of runs that are judged by the same."""
    splits = splits_of(lines)
    parts = [_split_table(lines, split) for split in splits]
    if len(splits) > 1 and (whole := shared_by_all(lines)):
        parts.append(f"### All splits together\n\n{_ALL}\n\n{_rows(metric, rows_of(whole, None))}")
    return parts + [_equal_bytes(lines, name, metric) for name in _OURS if rivals_of(lines, name)]


def _split_table(lines: Sequence[Line], split: Split) -> str:
    mine = [line for line in lines if split_of(line) == split]
    before = (
        f"Before the first round, on what is measured on the way: {sum(line.start for line in mine) / len(mine):.4f}."
    )
    return f"### {split}\n\n{before}\n\n{_rows(mine[0].metric, rows_of(mine, split))}"


def _rows(metric: Metric, rows: Iterable[Row]) -> str:
    return _table(("method", "seeds", metric.name, *_HEAD), map(_cells, rows))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _equal_bytes(lines: Sequence[Line], name: Name, metric: Metric) -> str:
    """What the others had learned for the same bytes."""
    rows = [
        (_called(rival.name), str(rival.runs), f"{rival.rounds:.1f}", _interval(rival.apart, rival.apart_95))
        for rival in rivals_of(lines, name)
    ]
    return (
        f"### At the bytes of {_called(name)}\n\nThe best {metric.name} that each method had measured by the time it "
        "had sent and fetched as much as this one has at its end, on the part of the held-out texts that is measured "
        f"on the way, less this one's last.\n\n{_table(('method', 'runs', 'rounds by then', 'difference'), rows)}"
    )


def _called(name: Name) -> str:
    method, budget, without = name
    return f"`{method}`" + (f" {budget}" if budget else "") + (f", without {without}" if without else "")


def _interval(value: float | None, half: float | None) -> str:
    return _number(value, "+.4f") + (f" ± {half:.4f}" if half is not None else "")


def _cells(row: Row) -> tuple[str, ...]:
    seeds = dict.fromkeys(row.seeds)
    return (
        _called(row.name),
        " ".join(map(str, seeds)) if len(seeds) == len(row.seeds) else f"{len(row.seeds)} runs",
        f"{row.end:.4f}",
        _interval(row.apart, row.apart_95),
        f"{row.mb:.2f}",
        _times(row.bytes_ratio),
        _times(row.params_ratio),
        _number(row.compute, ".2f"),
        _number(row.rounds_to_95, ".1f"),
        _number(row.drift, ".2f"),
        *(_number(None if seconds is None else seconds / 60, ".1f") for seconds in row.seconds),
    )


def _times(value: float | None) -> str:
    """A ratio; one that is far below 1 in two digits that count."""
    return _number(value, ".1f" if value is None or value >= 0.1 else ".2g")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _apart(lines: Sequence[Line]) -> str:
    """What is not in the tables: head, bundle, commits, machines."""
    heads = sorted({(line.dataset, line.bytes_head) for line in lines})
    commits = ", ".join(dict.fromkeys(line.commit for line in lines))
    hosts = "; ".join(dict.fromkeys(f"{line.host.get('cpu')}, {line.host.get('threads')} thread" for line in lines))
    largest = max(line.bytes_first_download for line in lines) / 1e6
    return "\n".join(
        [
            *(
                f"- Head of {dataset}: {size / 1e6:.2f} MB for all devices."
                for dataset, size in dict(heads).items()
                if size
            ),
            f"- First download: at most {largest:,.0f} MB for all devices together.",
            f"- Commits: {commits}. Machines: {hosts}.",
        ]
    )


@click.command()
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path("bench/results/federation.jsonl"), show_default=True
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/results.md"), show_default=True)
@click.option("--html", type=click.Path(path_type=Path), default=Path("runs/results.html"), show_default=True)
def main(results: Path, out: Path, html: Path) -> None:
    """Turn lines of bench.federation into a page of tables and a picture."""
    try:
        lines = [line for line in read_lines(results).values() if not line.quick]
    except RequestError as error:
        raise click.UsageError(str(error)) from error
    if not lines:
        raise click.UsageError(f"{results}: no whole runs in it: make some with python -m bench.federation")
    out.write_text(markdown(lines), encoding="utf-8")
    html.parent.mkdir(parents=True, exist_ok=True)
    write_picture(html, [line for line in lines if not line.without])
    click.echo(f"{out}, {html}")


if __name__ == "__main__":
    main()
