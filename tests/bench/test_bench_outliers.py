"""What is said of outliers, on imprints that are known, and one small run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import numpy as np
from click.testing import CliRunner

from bench.federation.data import share_texts
from bench.federation.lines import Key
from bench.federation.shares import Sizes
from bench.federation.site import Setup
from bench.outliers.__main__ import main
from bench.outliers.figures import Figures, directions, enlarged, norms, turned
from bench.outliers.measuring import Asked, Line, measure
from cloud.aggregate import Imprint, Part
from edge_runtime.engine.runtime import start_runtime
from tests.bench.banking import write_banking


def imprints(common: float, sizes: tuple[float, ...]) -> dict[str, Imprint]:
    """Devices of these norms that have so much of their direction in common."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=4096)
    found = {}
    for number, size in enumerate(sizes):
        direction = common * shared + (1 - common) * rng.normal(size=4096)
        unit = (direction / np.linalg.norm(direction)).astype(np.float32)
        found[f"device-{number:02d}"] = Imprint(0, (Part(size, unit),))
    return found


def test_the_figures_are_those_of_every_device() -> None:
    figures = Figures()
    figures.add(imprints(0.5, (1.0, 2.0, *[1.0] * 8)))
    assert sorted(figures.norms) == [*[1.0] * 9, 2.0]
    assert len(figures.cosines) == 10
    assert all(0.5 < cosine < 0.9 for cosine in figures.cosines)


def test_what_agrees_is_told_from_what_is_turned_around() -> None:
    rules = directions([imprints(0.5, (1.0,) * 20)], np.random.default_rng(0), 20)
    assert [rule.bound for rule in rules] == [-0.05, -0.10, -0.15, -0.20, -0.30]
    assert all((rule.found, rule.aside, rule.honest) == (1.0, 0.0, 0.0) for rule in rules)


def test_what_has_nothing_in_common_is_not() -> None:
    rules = directions([imprints(0.0, (1.0,) * 20)], np.random.default_rng(0), 20)
    assert all(rule.found < 0.1 for rule in rules)


def test_a_bound_on_the_norm_costs_those_who_have_most() -> None:
    """One honest device in twenty is seven times as large."""
    rules = norms([imprints(0.5, (7.0, *[1.0] * 19))], np.random.default_rng(0), 20)
    assert [rule.bound for rule in rules] == [3.0, 5.0, 10.0]
    assert [rule.found for rule in rules] == [1.0, 1.0, 1.0]
    assert [rule.honest for rule in rules] == [0.05, 0.05, 0.0]


def test_what_hostile_updates_leave() -> None:
    """The same as sketching them would: a sketch is linear."""
    (imprint,) = imprints(0.5, (2.0,)).values()
    assert np.array_equal(turned(imprint).parts[0].sketch, -imprint.parts[0].sketch)
    assert turned(imprint).parts[0].norm == 2.0
    assert enlarged(imprint).parts[0].norm == 200.0


def test_amounts_may_be_unequal(tmp_path: Path) -> None:
    write_banking(tmp_path)
    equal = Sizes(devices=4, cohort=2, rounds=1, examples=200, glimpse=1, every=1)
    unequal = msgspec.structs.replace(equal, spread=1.0)
    whole, parts = (share_texts("banking77", tmp_path, sizes, 5.0, 0).devices for sizes in (equal, unequal))
    assert all(part == of[: len(part)] for part, of in zip(parts, whole, strict=True))
    assert min(map(len, parts)) >= 16
    assert sum(len(part) == len(of) for part, of in zip(parts, whole, strict=True)) == 1


def test_a_run_is_measured(tmp_path: Path, bert_bundle: Path) -> None:
    write_banking(tmp_path / "data")
    (tmp_path / "run").mkdir()
    asked = Asked("banking77", 50.0, 0, "rolora-r8", "", rounds=2, examples=200, spread=0.0, steps=1)
    setup = Setup(
        key=Key("banking77", 50.0, 0, "rolora-r8", "", "", True),
        data=str(tmp_path / "data"),
        bundle=str(bert_bundle),
        folder=str(tmp_path / "run"),
        sizes=Sizes(devices=8, cohort=8, rounds=2, examples=200, glimpse=1, every=1),
        threads=start_runtime(),
        products="exact",
        extra={"task": {"rank": 4}, "training": {"steps": 1, "epochs": None, "lr_b": 1e-2}},
    )
    said: list[str] = []
    line = asyncio.run(measure(asked, setup, draws=5, say=said.append))
    assert line.texts[0] >= 16
    assert line.norm[0] <= 1.0 <= line.norm[2]
    assert -1 <= line.cosine[0] <= line.cosine[1] <= line.cosine[2] <= 1
    assert all(rule.found == 1.0 for rule in line.enlarged)
    assert msgspec.json.decode(msgspec.json.encode(line), type=Line) == line


def test_help_says_what_it_is_for() -> None:
    assert "hundred times as large" in CliRunner().invoke(main, ["--help"]).output
