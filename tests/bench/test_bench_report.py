"""The page of results: the core table, what has one seed, ingredients, and goals."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from bench import report
from bench.federation.goals import goals_of
from bench.federation.ingredients import ingredients_of
from bench.federation.lines import Line
from bench.federation.variants import OURS, VARIED
from bench.jsonl import append_line
from tests.bench.federation_lines import KEY, a_line


def test_the_report_has_a_table_a_split_and_a_picture(tmp_path: Path) -> None:
    for seed in (0, 1):
        for method in ("lora-r8", "rolora-r8"):
            append_line(tmp_path / "r.jsonl", a_line(msgspec.structs.replace(KEY, method=method, seed=seed)))
    append_line(tmp_path / "r.jsonl", a_line(msgspec.structs.replace(KEY, alpha=0.1)))
    out, page = tmp_path / "results.md", tmp_path / "results.html"
    arguments = ["--results", str(tmp_path / "r.jsonl"), "--out", str(out), "--html", str(page)]
    done = CliRunner().invoke(report.main, arguments)
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert "## banking77, Dirichlet 0.5" in text
    assert "## banking77, Dirichlet 0.1" in text
    assert "One seed each" not in text
    assert "| `rolora-r8` | 0 1 | 0.5000 | +0.0000 ± 0.0000 |" in text
    together = text.split("### All splits together")[1].split("###")[0]
    assert "| `lora-r8` | 0 1 | 0.5000 | +0.0000 ± 0.0000 |" in together  # at 0.1 the other has no run
    assert "plotly" in page.read_text()[:5000]
    (tmp_path / "r.jsonl").write_text("")
    done = CliRunner().invoke(report.main, arguments)
    assert done.exit_code == 2
    assert "no whole runs in it" in done.output


def test_the_report_keeps_what_has_one_seed_apart_from_the_core_table(tmp_path: Path) -> None:
    ours = msgspec.structs.replace(KEY, dataset="clinc150", alpha=0.1, method=OURS, budget=VARIED)
    reference = msgspec.structs.replace(ours, method="lora-r8", budget="")
    lines = [a_line(msgspec.structs.replace(key, seed=seed)) for key in (reference, ours) for seed in (0, 1)]
    worse = a_line(msgspec.structs.replace(ours, without="reviving"))
    lines += [
        msgspec.structs.replace(worse, accuracy=0.4),
        a_line(msgspec.structs.replace(ours, without="frozen-head")),
    ]
    lines += [a_line(msgspec.structs.replace(key, alpha=None)) for key in (reference, ours)]
    core, others = report.markdown(lines).split("## One seed each")
    assert "reviving" not in core
    assert "natural" not in core
    assert "| `annealed-kill-revive` small | 0 1 |" in core
    unlike, ingredients = others.split("### What each ingredient gives")
    assert "### clinc150, natural split" in unlike
    assert "| `annealed-kill-revive` small, without frozen-head | 0 |" in unlike
    assert "| `annealed-kill-revive` small | 0 | 0.5000 | +0.0000 |" in unlike  # of seed 0 alone
    assert "reviving" not in unlike
    rows = [row for row in ingredients.split("## Goals")[0].splitlines() if row.startswith("| ")]
    assert [row.split(" | ")[:4] for row in rows[1:]] == [
        ["| –", "–", "0.5000", "+0.0000"],
        ["| reviving", "what is dead stays dead", "0.4000", "-0.1000"],
    ]
    assert [row.split(" | ")[-1] for row in rows[1:]] == ["– |", "+0.1000 accuracy |"]
    assert "### What each ingredient gives" not in report.markdown(lines[:4])


@pytest.mark.parametrize(
    ("changed", "gives"),
    [
        ({}, "nothing"),
        ({"accuracy": 0.505}, "nothing"),
        ({"accuracy": 0.51}, "-0.0100 accuracy"),
        ({"bytes_up": 70}, "-82% of the bytes"),
        ({"device_gflop": 0.08, "accuracy": 0.4}, "+0.1000 accuracy, +25% of the compute"),
    ],
)
def test_an_ingredient_that_gives_nothing_is_said_to_give_nothing(changed: dict[str, float], gives: str) -> None:
    whole = a_line(msgspec.structs.replace(KEY, method=OURS, budget=VARIED))
    less = msgspec.structs.replace(whole, without="reviving", **changed)
    found = ingredients_of({line.key: line for line in (whole, less)})
    assert [(ingredient.line.without, ingredient.gives) for ingredient in found] == [
        ("", "nothing"),
        ("reviving", gives),
    ]
    assert ingredients_of({less.key: less}) == []


def test_the_goals_are_judged_by_what_every_row_has() -> None:
    reference = msgspec.structs.replace(a_line(KEY), accuracy=0.9, bytes_up=4000, params_up=400, device_gflop=1.0)
    near = {"accuracy": 0.896, "bytes_up": 60, "params_up": 30, "device_gflop": 0.4}
    key = msgspec.structs.replace(KEY, method=OURS)
    large = msgspec.structs.replace(a_line(msgspec.structs.replace(key, budget="large")), **near)
    small = msgspec.structs.replace(a_line(msgspec.structs.replace(key, budget="small")), **{**near, "accuracy": 0.8})
    whole_key = msgspec.structs.replace(KEY, method="fedavg-full")
    whole = msgspec.structs.replace(a_line(whole_key), bytes_up=10**6)

    def met(*core: Line) -> list[bool]:
        return [goal.met for goal in goals_of(core, [whole], [])]

    assert met(reference, large, small) == [True, True, True, True, True, True, True]
    assert met(reference, small)[:4] == [False, False, False, True]
    assert met(reference, msgspec.structs.replace(large, bytes_up=100), small)[:2] == [False, True]
    assert met(reference, msgspec.structs.replace(large, bytes_up=2000), small)[-1] is False
    better = msgspec.structs.replace(a_line(msgspec.structs.replace(KEY, method="lora-a2")), bytes_up=0, bytes_down=0)
    curve = (msgspec.structs.replace(better.curve[0], accuracy=0.7, bytes_up=0, bytes_down=0),)
    better = msgspec.structs.replace(better, curve=curve)
    assert met(reference, large, better)[4] is False
    assert goals_of([reference], [], []) == []
