"""The report: its fields, its bounds, and a page that needs no network."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from cloud.config import parse_config
from cloud.demo.page import page
from cloud.demo.recipe import CLASSIFY, LM, Recipe, config_text
from cloud.demo.record import Report, cumulated, misses

PROMISED = [
    *("model", "task", "devices", "rounds", "metric", "before", "after", "central", "peft_after", "tfidf"),
    *("bytes_up", "bytes_down", "bytes_full_fedavg", "run_s", "round_s", "edge_peak_private_mb", "edge_peak_rss_mb"),
    *("adapter", "bundle_digest"),
]


@pytest.fixture
def report() -> Report:
    return Report(
        model="minilm",
        task="classify",
        devices=2,
        rounds=2,
        metric="accuracy",
        before=0.1,
        after=0.85,
        central=0.86,
        peft_after=0.85,
        tfidf=0.9,
        bytes_up=2_000_000,
        bytes_down=9_000_000,
        bytes_full_fedavg=700_000_000,
        run_s=12.5,
        round_s=(3.0, 4.0),
        edge_peak_private_mb=(100.0, 110.0),
        edge_peak_rss_mb=(200.0, 210.0),
        adapter="adapter",
        bundle_digest="ab" * 32,
        curve=(0.1, 0.6, 0.85),
        round_bytes_up=(1_000_000, 1_000_000),
        round_bytes_down=(8_000_000, 500_000, 500_000),
        edge_train_s=(1.0, 2.0),
        edge_examples={"device-1": {"email": 3, "xml": 1}, "device-2": {"email": 1, "xml": 3}},
    )


def test_the_json_has_every_promised_field(report: Report) -> None:
    fields = msgspec.to_builtins(report)
    assert list(fields)[: len(PROMISED)] == PROMISED


def test_the_page_needs_no_network_and_carries_the_script_once(report: Report) -> None:
    text = page(report)
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']?https?:", text)
    assert text.count("plotly.js v") == 1
    assert text.count("Plotly.newPlot(") >= 5
    for figure in ("0.850", "0.860", "0.900", "2.0 MB", "9.0 MB", "1.6%"):
        assert figure in text


def test_the_page_says_what_was_missed(report: Report) -> None:
    assert "Every figure is within its bounds" in page(report)
    assert "expected at least 0.8" in page(msgspec.structs.replace(report, after=0.5, peft_after=0.5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"after": 0.79, "peft_after": 0.79, "central": 0.8}, "at least 0.8"),
        ({"central": 0.89}, "within 0.03 of central"),
        ({"peft_after": 0.856}, "differ by more than 0.005"),
        ({"metric": "loss", "before": 0.8, "tfidf": None}, "a loss below"),
    ],
)
def test_a_figure_out_of_bounds_is_named(report: Report, changes: dict[str, float], words: str) -> None:
    assert misses(report) == []
    missed = misses(msgspec.structs.replace(report, **changes))
    assert len(missed) == 1
    assert words in missed[0]


def test_running_sums() -> None:
    assert cumulated((1, 2, 3)) == [1, 3, 6]


@pytest.mark.parametrize("recipe", [CLASSIFY, LM])
def test_the_aggregator_reads_the_demos_config(recipe: Recipe) -> None:
    config = parse_config(config_text(recipe, bundle="../bundle").encode(), path=Path("server/emberlora.toml"))
    assert config.task.rounds == recipe.rounds
    assert config.training.steps == recipe.steps
    assert config.training.lr_b == recipe.rates.b
